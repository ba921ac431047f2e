"""What the package adds to the start of Python and to ``import mlx_lm``.

    python tests/benchmarks/hooks/startup.py [--runs 60]

Two virtual environments see the same dependencies; only one has the package, installed as a wheel
would be. Their runs alternate, so that a busy machine slows both. Exit status 1 if over budget.
"""

import argparse
import compileall
import os
import shutil
import statistics
import subprocess
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PARTS = (
    "mlx_optiq_ext",
    "hooks/mlx_optiq_hooks",
    "compat/mlx_optiq_compat",
    "hooks/mlx_optiq_ext.pth",
    "hooks/mlx_optiq_ext.start",
)
#: Program -> what it may take longer: milliseconds, or a share of the plain time.
BUDGETS = {"pass": 1.0, "import mlx_lm": 0.08}


def environment(folder: Path, *, ours: bool) -> Path:
    """A virtual environment with or without the package; returns its python."""
    venv.create(folder, symlinks=True)
    base = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", base))
    paths = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "dependencies.pth").write_text("\n".join(paths) + "\n")
    for part in PARTS if ours else ():
        source, target = ROOT / part, site / Path(part).name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            compileall.compile_dir(target, quiet=1)
        else:
            shutil.copy(source, target)
    return folder / "bin" / "python"


def milliseconds(python: Path, program: str) -> float:
    """One run of ``python -c program``, in an environment without our switches."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MLX_OPTIQ", "PYTHONPATH"))}
    begin = time.perf_counter()
    subprocess.run([python, "-c", program], check=True, env=env, cwd="/")
    return (time.perf_counter() - begin) * 1000


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=60, help="Runs of each program. Default: 60.")
    runs = parser.parse_args().runs
    over = False
    print(f"{'python -c':<16}{'without':>12}{'with':>12}{'difference':>14}{'budget':>10}")
    with tempfile.TemporaryDirectory() as folder:
        plain = environment(Path(folder) / "plain", ours=False)
        ours = environment(Path(folder) / "ours", ours=True)
        for program, allowed in BUDGETS.items():
            times: dict[Path, list[float]] = {plain: [], ours: []}
            for python in times:
                milliseconds(python, program)  # warm the file cache
            for run in range(runs):
                for python in (plain, ours) if run % 2 else (ours, plain):
                    times[python].append(milliseconds(python, program))
            before, after = (statistics.median(times[python]) for python in (plain, ours))
            budget = allowed if allowed >= 1 else allowed * before
            over |= after - before > budget
            difference = f"{after - before:+.2f} ms"
            print(
                f"{program:<16}{before:>9.1f} ms{after:>9.1f} ms{difference:>14}{budget:>7.1f} ms"
            )
    raise SystemExit(over)


if __name__ == "__main__":
    main()
