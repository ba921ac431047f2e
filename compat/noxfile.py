"""The task runner: ``nox -f compat/noxfile.py``; add ``-l`` to list the sessions.

One ``tests`` session per supported row of matrix.toml, each in a fresh environment with the
pins of compat/constraints. Without ``-s``, the rows marked ``ci`` run, and the checks.

    nox -f compat/noxfile.py -s "tests(0.32.2)" -- -x tests/compat
"""

from __future__ import annotations

import sys
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "compat" / "constraints"
MATRIX = nox.project.load_toml(ROOT / "compat" / "mlx_optiq_compat" / "matrix.toml")
ROWS = [row for row in MATRIX["row"] if row["verdict"] != "outside"]
#: One worker for each core; each takes whole files, because fixtures take the most time. After
#: xdist has replaced a crashed worker it may wait forever, so it replaces none.
WORKERS = ("-n", "auto", "--dist", "loadfile", "--max-worker-restart", "0")
#: Workers fill the cores, so that each computes on one.
ONE_CORE = {"OPENBLAS_NUM_THREADS": "1"}

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = [
    "lint",
    "types",
    "docs",
    "signatures",
    *(f"tests({row['mlx_lm']})" for row in ROWS if row.get("ci")),
    "yolo",
    *(["cuda"] if sys.platform == "linux" else []),
]


@nox.session
@nox.parametrize("row", [nox.param(row, id=row["mlx_lm"]) for row in ROWS])
def tests(session: nox.Session, row: dict) -> None:
    """Run the tests against one mlx-lm release; arguments after -- go to pytest."""
    session.chdir(ROOT)  # nox starts in the noxfile's folder
    pins = CONSTRAINTS / f"mlx-lm-{row['mlx_lm']}.txt"
    backend = [] if sys.platform == "darwin" else ["mlx[cpu]"]
    needs = [f"mlx-lm=={row['mlx_lm']}", *backend, "-e", ".[test]"]
    session.install("-c", str(pins), *needs)
    # The environment passes through; some machines need their LD_PRELOAD for MLX.
    session.run("pytest", *(session.posargs or [*WORKERS, "tests"]), env=ONE_CORE)


@nox.session
def yolo(session: nox.Session) -> None:
    """Run the YOLO26 tests with yolo-mlx, which needs an older mlx than the newest mlx-lm."""
    session.chdir(ROOT)
    package, tested = MATRIX["yolo_mlx"], MATRIX["yolo_mlx"]["tested_with"]
    backend = [] if sys.platform == "darwin" else [f"mlx[cpu]=={tested['mlx']}"]
    session.install(
        *backend,
        f"mlx=={tested['mlx']}",
        f"mlx-lm=={tested['mlx_lm']}",
        f"transformers=={tested['transformers']}",
        f"yolo-mlx=={package['version']}",
        "pycocotools>=2.0.8",
        "-e",
        ".[test,yolo]",
    )
    session.run("pytest", *(session.posargs or [*WORKERS, "tests/yolo"]), env=ONE_CORE)


@nox.session
def cuda(session: nox.Session) -> None:
    """Compile the CUDA kernels that the tests run with CUDA's compiler, which needs no GPU."""
    session.chdir(ROOT)
    pins = CONSTRAINTS / f"mlx-lm-{ROWS[-1]['mlx_lm']}.txt"
    compiler = ("nvidia-cuda-nvrtc==13.*", "nvidia-cuda-runtime==13.*", "nvidia-cuda-cccl==13.*")
    session.install("-c", str(pins), "mlx[cpu]", "-e", ".[test]", "cuda-bindings==13.*", *compiler)
    chosen = ("tests/kv/attention", "tests/weights/rounding/test_device.py", "-k", "cuda")
    session.run(
        "pytest",
        *(session.posargs or [*WORKERS, *chosen]),
        env={**ONE_CORE, "MLX_OPTIQ_NVRTC": "1"},
    )


@nox.session
def peft(session: nox.Session) -> None:
    """Compare LoRA adapters with real PEFT, both ways. Downloads torch."""
    session.chdir(ROOT)
    pins = CONSTRAINTS / f"mlx-lm-{ROWS[-1]['mlx_lm']}.txt"
    backend = [] if sys.platform == "darwin" else ["mlx[cpu]"]
    session.install("-c", str(pins), *backend, "-e", ".[test]", "torch", "peft")
    session.run("pytest", *(session.posargs or ["-m", "peft"]))


@nox.session
def signatures(session: nox.Session) -> None:
    """Compare the recorded signatures of every row with the wheels on PyPI."""
    session.chdir(ROOT)
    session.install("pip")
    session.run("python", "compat/record.py", "--all", "--check")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.chdir(ROOT)
    session.install("ruff>=0.14")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a broken link ends it. After -- comes the folder to keep it in."""
    session.chdir(ROOT)
    session.install("mkdocs-material>=9.5")
    site = session.posargs[0] if session.posargs else str(Path(session.create_tmp()) / "site")
    session.run(
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(Path(site).resolve()),
        env={"NO_MKDOCS_2_WARNING": "1"},
    )


@nox.session
def types(session: nox.Session) -> None:
    """Check types against the newest row."""
    session.chdir(ROOT)
    pins = CONSTRAINTS / f"mlx-lm-{ROWS[-1]['mlx_lm']}.txt"
    backend = [] if sys.platform == "darwin" else ["mlx[cpu]"]
    session.install("-c", str(pins), *backend, "-e", ".[test]", "pyright>=1.1.400", "nox>=2025.2")
    # pyright runs on Node.js, which a preloaded BLAS keeps from starting its threads.
    session.run("pyright", env={"LD_PRELOAD": None})


@nox.session
def build(session: nox.Session) -> None:
    """Build the sdist and the wheel, and check their metadata."""
    session.install("build>=1.2", "twine>=6")
    dist = Path(session.create_tmp()).resolve() / "dist"
    session.chdir(ROOT)
    session.run("python", "-m", "build", "--outdir", str(dist))
    session.run("twine", "check", "--strict", *map(str, sorted(dist.iterdir())))


@nox.session(venv_backend="none")
def pins(session: nox.Session) -> None:
    """Write compat/constraints anew from matrix.toml; needs uv. Names of rows after -- limit it."""
    for row in ROWS:
        if session.posargs and row["mlx_lm"] not in session.posargs:
            continue
        tested = row["tested_with"]
        needs = Path(session.create_tmp()) / "requirements.in"
        needs.write_text(
            f"mlx-lm=={row['mlx_lm']}\nmlx[cpu]=={tested['mlx']}\n"
            f"transformers=={tested['transformers']}\n"
            "wrapt>=2\npluggy>=1.5\nsafetensors\nnumpy\nhuggingface-hub\ntqdm\n"
        )
        target = CONSTRAINTS / f"mlx-lm-{row['mlx_lm']}.txt"
        command = ["uv", "pip", "compile", "--quiet", "--no-annotate", "--upgrade"]
        command += ["--python-version", "3.11", "--prerelease", "if-necessary-or-explicit"]
        command += ["--custom-compile-command", "nox -f compat/noxfile.py -s pins"]
        session.run(*command, "--output-file", str(target), str(needs), external=True)
