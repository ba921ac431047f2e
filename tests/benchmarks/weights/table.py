"""Quality of budgeted conversions at the bytes of stock's uniform ones, beside other methods.

    python tests/benchmarks/weights/table.py MODEL --calibration FILE --text FILE
        [--problems FILE.jsonl] [--budgets 4.5 4.0 3.5 3.0] [--methods stock taylor kl refine
        distill dynamic_quant gptq mlx-optiq] [--mlx-optiq VENV] [--sweep-windows N]
        [--rows FILE.jsonl] [--again] [--keep] [--work FOLDER]

Each conversion and each evaluation runs in a process of its own, with nothing measured beforehand.
Rows are added to ``--rows`` as they finish; a run that was stopped goes on behind the last, and
``--again`` measures anew. Peak memory is the whole process's (resident) and MLX's own. A ``*``
behind a time says that other programs used more than a quarter of a core meanwhile; processor
seconds suffer less from that.

Rivals calibrate on this package's calibration sequences: gptq on all that refinement may use,
dynamic_quant on those that plans are measured and judged on, mlx-optiq (0.7.7, see
rivals/mlx_optiq.py for its environment) on those that they are measured on. Its sweep serves all
budgets and its time counts in each; ``--sweep-windows`` cuts it where that takes too long.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from rivals import rows
from rivals.methods import METHODS, UNIFORM, Run, Setting, known_flags, missing_flag
from rivals.process import Cost, measure

HERE = Path(__file__).parent


def evaluate(args: argparse.Namespace, converted: Path) -> dict:
    """What ``quality.py`` finds: bits per weight, KL and accuracy."""
    command = [sys.executable, str(HERE / "quality.py"), str(args.model), str(converted)]
    command += ["--text", str(args.text), "--json"]
    command += ["--problems", str(args.problems)] if args.problems else []
    environment = {**os.environ, "MLX_OPTIQ_EXT": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def with_sweep(cost: Cost, setting: Setting, started: float) -> Cost:
    """The cost with the time of a sweep that was read from mlx-optiq's checkpoint."""
    timing = setting.checkpoint.with_suffix(".timing")
    if cost.failure or timing.stat().st_mtime > started:
        return cost
    sweep = json.loads(timing.read_text())
    return replace(
        cost,
        seconds=cost.seconds + sweep["seconds"],
        processor=cost.processor + sweep["processor"],
    )


def row(args: argparse.Namespace, method: str, setting: Setting, run: Run) -> rows.Row:
    """Convert and evaluate."""
    shutil.rmtree(run.out, ignore_errors=True)
    started = time.time()
    cost = measure(
        run.python,
        *run.command,
        environment=run.environment,
        folder=setting.work,
        log=args.rows.with_suffix(".log"),
    )
    if method == "mlx-optiq":
        cost = with_sweep(cost, setting, started)
    found = {"bpw": None, "kl": None, "accuracy": None}
    if cost.failure is None:
        found = evaluate(args, run.out)
    if not args.keep:
        shutil.rmtree(run.out, ignore_errors=True)
    return {
        "budget": setting.budget,
        "label": run.label,
        **{key: found[key] for key in ("bpw", "kl", "accuracy")},
        "cost": asdict(cost),
        "contended": cost.contended,
        "at": time.strftime("%Y-%m-%d %H:%M", time.gmtime(started)),
        "commit": commit(),
    }


def commit() -> str | None:
    """What of this repository is checked out."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None


def absolute(text: str) -> Path:
    """A path that holds in any working folder; a virtual environment's links are kept."""
    return Path(text).absolute()


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=absolute)
    parser.add_argument("--calibration", type=absolute, required=True)
    parser.add_argument("--text", type=absolute, required=True)
    parser.add_argument("--problems", type=absolute)
    parser.add_argument("--budgets", type=float, nargs="+", default=list(UNIFORM), choices=UNIFORM)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--mlx-optiq", type=absolute, metavar="VENV")
    parser.add_argument("--sweep-windows", type=int, metavar="N", help="cut mlx-optiq's sweep")
    parser.add_argument("--rows", type=absolute, default=absolute("weights_table.jsonl"))
    parser.add_argument("--again", action="store_true", help="measure anew what has a row")
    parser.add_argument("--keep", action="store_true", help="keep the converted models")
    parser.add_argument("--work", type=absolute, help="folder for them, and for mlx-optiq's sweep")
    return parser.parse_args()


def fill(args: argparse.Namespace, setting: Setting) -> None:
    """Add the rows of one budget that are missing."""
    for method in args.methods:
        for run in METHODS[method](setting):
            if not args.again and (setting.budget, run.label) in rows.latest(rows.read(args.rows)):
                continue
            if flag := missing_flag(run, known_flags()):
                print(f"{run.label}: this version has no {flag}", file=sys.stderr)
                continue
            found = row(args, method, setting, run)
            rows.append(args.rows, found)
            print(rows.line(found, None), flush=True)


def main() -> None:
    """Fill in the rows that are missing, then print all."""
    args = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        windows = work / "windows.npz"
        script = str(HERE / "rivals" / "windows.py")
        paths = map(str, (args.model, args.calibration, windows))
        subprocess.run([sys.executable, script, *paths], check=True)
        for budget in args.budgets:
            given = (args.model, args.calibration, windows, work, budget)
            fill(args, Setting(*given, args.mlx_optiq, args.sweep_windows))
    print(rows.table(rows.read(args.rows)))


if __name__ == "__main__":
    main()
