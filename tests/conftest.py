"""Fixtures for every test: a tiny model, commands in clean processes, a stand-in mlx-lm."""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import settings
from loopback import launcher, surroundings

from mlx_optiq_compat import installed_version, rows
from mlx_optiq_compat.version import release

TESTS = Path(__file__).resolve().parent
# --hypothesis-profile thorough: ten times as many examples, where a test does not say how many.
settings.register_profile("thorough", max_examples=1000)

SHARED = Path(os.environ.get("MLX_OPTIQ_SHARED") or TESTS.parent.parent / "shared")

#: What no release of mlx-lm or of the MLX beside it changes: runs as if marked ``newest``.
NEWEST = (
    "adapters/test_layers.py",
    "compat",
    "distributed/test_convert.py",
    "distributed/test_exchange.py",
    "evaluation/test_gsm8k.py",
    "evaluation/test_kl.py",
    "evaluation/test_seeing_and_hearing.py",
    "evaluation/test_statistics.py",
    "files",
    "hooks/test_arrows.py",
    "hooks/test_interruption.py",
    "kv/attention/test_backends.py",
    "kv/attention/test_kernels.py",
    "kv/attention/test_pack_kernel.py",
    "kv/test_plan.py",
    "kv/test_plan_source.py",
    "latency/test_calibration.py",
    "latency/test_chips.py",
    "latency/test_layout.py",
    "latency/test_published.py",
    "lora/test_exchange.py",
    "lora/test_patterns.py",
    "lora/test_ranks.py",
    "lora/test_reading.py",
    "packaging",
    "planning",
    "prompts",
    "test_benchmarks.py",
    "test_docs.py",
    "turboquant",
    "weights/report",
    "weights/rounding",
    "weights/sensitivity",
    "weights/test_study.py",
    # yolo-mlx pins an mlx that only older releases take: where it is, all of its tests run.
    *([] if importlib.util.find_spec("yolo26mlx") else ["yolo"]),
)

Run = Callable[..., subprocess.CompletedProcess[str]]


def pytest_configure(config):
    # Before any test module imports mlx_lm: nothing is read from or left in the developer's home,
    # nothing is downloaded, and the switches of the developer's shell do not count.
    home = tempfile.mkdtemp(prefix="mlx-optiq-ext-tests-")
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    for name in ("", "_API_KEY", "_BLOCK", "_METAL_KERNEL", "_STREAM", "_TRACE"):
        os.environ.pop(f"MLX_OPTIQ_EXT{name}", None)
    os.environ.update(
        HOME=home,
        HF_HOME=f"{home}/huggingface",
        HF_HUB_OFFLINE="1",
        MLX_OPTIQ_EXT_CACHE=f"{home}/cache",
    )


def has_peft() -> bool:
    """Whether there is a Python with real PEFT to compare with."""
    named = os.environ.get("MLX_OPTIQ_PEFT_PYTHON")
    return bool(named) or all(map(importlib.util.find_spec, ("peft", "torch")))


def pytest_collection_modifyitems(config, items):
    # These have nox sessions of their own: yolo-mlx pins an mlx that the newest mlx-lm does not
    # take, and PEFT brings torch. What PEFT found is recorded and always tested.
    missing = [name for name in NEWEST if not (TESTS / name).exists()]
    if missing:
        raise pytest.UsageError(f"tests/conftest.py names what is not there: {', '.join(missing)}")
    folders = tuple(TESTS / name for name in NEWEST)
    for item in items:
        if any(item.path.is_relative_to(each) for each in folders):
            item.add_marker(pytest.mark.newest)
    absent_markers = [
        *([] if importlib.util.find_spec("yolo26mlx") else ["yolo"]),
        *([] if has_peft() else ["peft"]),
        *([] if release(installed_version() or "0") >= release(rows()[-1].mlx_lm) else ["newest"]),
    ]
    apart = [item for item in items if any(map(item.get_closest_marker, absent_markers))]
    config.hook.pytest_deselected(items=apart)
    items[:] = [item for item in items if item not in apart]
    if not SHARED.is_dir():
        absent = pytest.mark.skip(reason=f"{SHARED} is absent")
        for item in items:
            if item.get_closest_marker("shared"):
                item.add_marker(absent)


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same random weights, whatever ran before it."""
    mx.random.seed(0)


@pytest.fixture(scope="session")
def tiny() -> Path:
    """A real Qwen3 of 1.6 million parameters, with its tokenizer."""
    return TESTS / "data" / "tiny-qwen3"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Models and data sets too large for the repository; for tests marked ``shared``."""
    return SHARED


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Run:
    """Runs a command in a process of its own.

    The first word is ``"python"`` or a console script beside it, such as ``"mlx_lm.convert"``. The
    working folder is new and empty unless given; ``env`` is added to the environment.
    """

    def run(
        *command: str | Path,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        check: bool = False,
        timeout: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        name, *arguments = map(str, command)
        python = Path(sys.executable)
        program = python if name == "python" else python.with_name(name)
        surroundings = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [str(program), *arguments],
            cwd=cwd or tmp_path_factory.mktemp("run"),
            env={**surroundings, "COLUMNS": "100", **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(done.args)}\n{done.stdout}{done.stderr}")
        return done

    return run


@pytest.fixture(scope="session")
def launch(tmp_path_factory) -> Run:
    """Runs a Python command on several ranks over loopback, as users do with ``mlx.launch``.

    Takes the number of ranks and the words after ``python``. What the ranks print comes joined.
    ``whole`` starts them by the command itself, which takes a core.
    """

    def launch(
        ranks: int,
        *words: str | Path,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        timeout: float = 120,
        whole: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        silence, held = os.pipe()  # at the end of its input the launcher would spin
        try:
            return subprocess.run(
                [*launcher(ranks, whole=whole), "python", *map(str, words)],
                cwd=cwd or tmp_path_factory.mktemp("ranks"),
                env={**surroundings(), **(env or {})},
                stdin=silence,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        finally:
            os.close(silence)
            os.close(held)

    return launch


@dataclass(frozen=True)
class Outcome:
    """What a stock command's main() came to."""

    status: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch, capsys, tmp_path) -> Callable[..., Outcome]:
    """Runs the main() of a stock command here, in an empty working folder."""
    folder = tmp_path / "working"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def command(name: str, *arguments: object) -> Outcome:
        module = importlib.import_module(f"mlx_lm.{name}")
        monkeypatch.setattr(sys, "argv", [f"mlx_lm.{name}", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            module.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        printed = capsys.readouterr()
        return Outcome(status, printed.out, printed.err)

    return command


@pytest.fixture
def fake_mlx_lm(tmp_path) -> Callable[..., dict[str, str]]:
    """Copies a small stand-in for mlx-lm and returns the environment that puts it first.

    Give it the version that it should claim, and that of the mlx beside it.
    """

    def fake(version: str = "0.32.2", mlx: str = rows()[-1].tested_mlx) -> dict[str, str]:
        folder = tmp_path / "fake"
        shutil.copytree(TESTS / "fake_mlx_lm", folder, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "mlx_lm" / "_version.py").write_text(f'__version__ = "{version}"\n')
        metadata = folder / f"mlx-{mlx}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mlx\nVersion: {mlx}\n")
        return {"PYTHONPATH": str(folder)}

    return fake


@pytest.fixture
def plugin(tmp_path) -> Callable[..., dict[str, str]]:
    """Writes a module and the metadata of an installed distribution that names it as a plugin.

    Returns ``environment`` with the folder added to PYTHONPATH.
    """

    def plugin(environment: dict[str, str], name: str, source: str) -> dict[str, str]:
        folder = tmp_path / "plugins"
        metadata = folder / f"{name}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (folder / f"{name}.py").write_text(source)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[mlx_optiq_ext]\n{name} = {name}\n")
        known = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
        paths = dict.fromkeys([str(folder), *known])
        return {**environment, "PYTHONPATH": os.pathsep.join(paths)}

    return plugin
