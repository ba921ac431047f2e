"""Quality of budgeted conversions of a real model beside other methods at the same bytes.

    python tests/benchmarks/weights/table.py MODEL --calibration FILE --texts FOLDER
        [--budgets 4.5 4.0 3.5 3.0] [--methods stock plan refine distill dwq ggml ...]
        [--rates 1e-6 1e-5 5e-5] [--ggml LIBRARY] [--recipes IQ4_XS/Q4_K+ ...]
        [--mlx-optiq VENV] [--sweep-windows N] [--tokens N] [--jobs N]
        [--rows FILE.jsonl] [--again] [--keep] [--work FOLDER]
    python tests/benchmarks/weights/table.py --show [--rows FILE.jsonl ...] [--kinds wikitext]
        [--into PAGE.md]

Each conversion runs in a process of its own, with nothing measured beforehand, and ``--jobs`` of
them side by side; one more process holds the original's log-probabilities and judges them all by
KL on four kinds of text (see kinds.py). A row has bits per weight over all tensors, file bytes,
seconds and KL. Rows are added to ``--rows`` as they finish; a run that was stopped goes on behind
the last, and ``--again`` measures anew. Peak memory is the whole process's (resident) and MLX's
own. A ``*`` behind a time says that other programs used more than a quarter of a core meanwhile;
processor seconds suffer less from that.

``stock`` converts uniformly at the sizes next to the budget; dwq starts from the same. ``ggml``
takes K- and I-quants on both sides of the budget (see rivals/ggml.py for the library and what a
recipe's ``/`` and ``+`` mean). Rivals calibrate on the same text: dwq on 1,600 pieces of it, gptq
on all sequences that refinement may use, dynamic_quant on those that plans are measured and judged
on, mlx-optiq (0.7.7, see rivals/mlx_optiq.py for its environment) on those that they are measured
on. Its sweep serves all budgets and its time counts in each; ``--sweep-windows`` cuts it where that
takes too long.

``--show`` prints the quality table: KL and its share of stock's, K- and I-quants at the budget's
size on straight lines between sizes and logarithms of KL, the best of dwq's rates, and how ours
compare with the better of these rivals; then every file. ``--into`` also puts the quality table
between the marks of a page such as docs/benchmarks.md, whose first mark names the files of rows.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rivals import comparison, process, rows
from rivals.judge import Judge
from rivals.methods import BUDGETS, METHODS, RATES, Run, Setting, known_flags, missing_flag

HERE = Path(__file__).parent

#: What runs if nothing is named; the others are older rivals.
USUAL = ("stock", "plan", "refine", "distill", "dwq", "ggml")


def with_shared(cost: process.Cost, shared: Path, started: float) -> process.Cost:
    """The cost with the time of what an earlier run has left for this one."""
    timing = shared.with_suffix(".timing")
    if cost.failure or not timing.exists() or timing.stat().st_mtime > started:
        return cost
    spent = json.loads(timing.read_text())
    return replace(
        cost,
        seconds=cost.seconds + spent["seconds"],
        processor=cost.processor + spent["processor"],
    )


def size(converted: Path) -> dict[str, Any]:
    """Bytes of a model's weights; of what another format stores also its bits per weight."""
    stored = converted / "stored.json"
    if stored.exists():
        found = json.loads(stored.read_text())
        return {"bytes": found["bytes"], "bpw": 8 * found["bytes"] / found["parameters"]}
    return {"bytes": sum(file.stat().st_size for file in converted.glob("*.safetensors"))}


def row(args: argparse.Namespace, method: str, setting: Setting, run: Run, judge: Judge) -> None:
    """Convert, judge and add the row."""
    for folder in (run.out, run.scratch):
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    started = time.time()
    cost = process.measure(
        run.python,
        *run.command,
        environment=run.environment,
        folder=setting.work,
        log=args.rows.with_suffix(".log"),
    )
    if run.shared is not None:
        cost = with_shared(cost, run.shared, started)
    found: dict[str, Any] = {"bpw": None, "bytes": None, "kl": {}}
    if cost.failure is None:
        found |= judge(run.out) | size(run.out)
    if not args.keep:
        shutil.rmtree(run.out, ignore_errors=True)
    done = {
        **{"model": args.name, "tokens": args.tokens, "method": method, "label": run.label},
        "budget": None if run.fixed else setting.budget,
        **found,
        **{"cost": asdict(cost), "contended": cost.contended, "machine": platform.node()},
        "at": time.strftime("%Y-%m-%d %H:%M", time.gmtime(started)),
        "commit": commit(),
    }
    rows.append(args.rows, done)
    print(rows.line(done), flush=True)


def commit() -> str | None:
    """What of this repository is checked out."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def absolute(text: str) -> Path:
    """A path that holds in any working folder; a virtual environment's links are kept."""
    return Path(text).absolute()


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=absolute, nargs="?")
    parser.add_argument("--name", help="of the model in the rows; default its folder's")
    parser.add_argument("--calibration", type=absolute)
    parser.add_argument("--texts", type=absolute)
    parser.add_argument("--tokens", type=int, default=16384, help="judged, of each kind")
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--methods", nargs="+", default=list(USUAL), choices=METHODS)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="of dwq")
    parser.add_argument("--ggml", type=absolute, metavar="LIBRARY", help="libggml-base.so")
    parser.add_argument("--recipes", nargs="+", help="of K- and I-quants; default near each budget")
    parser.add_argument("--mlx-optiq", type=absolute, metavar="VENV")
    parser.add_argument("--sweep-windows", type=int, metavar="N", help="cut mlx-optiq's sweep")
    parser.add_argument("--jobs", type=int, default=1, help="conversions side by side")
    parser.add_argument(
        "--rows",
        type=absolute,
        nargs="+",
        default=[absolute("weights_table.jsonl")],
        help="where they are added; with --show any number of files",
    )
    parser.add_argument("--again", action="store_true", help="measure anew what has a row")
    parser.add_argument("--keep", action="store_true", help="keep the converted models")
    parser.add_argument("--work", type=absolute, help="folder for them and for what runs share")
    parser.add_argument("--show", action="store_true", help="only print the table")
    parser.add_argument("--kinds", nargs="+", help="of text that the table shows")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="put the table into this page")
    args = parser.parse_args()
    if not args.show and None in (args.model, args.calibration, args.texts):
        parser.error("MODEL, --calibration and --texts are needed")
    args.shown, args.rows = args.rows, args.rows[0]
    args.name = args.name or (args.model and args.model.name)
    return args


def missing(args: argparse.Namespace, work: Path) -> list[tuple[str, Setting, Run]]:
    """The runs that have no row yet, each once."""
    known = {} if args.again else {rows.key(row) for row in rows.latest(rows.read(args.rows))}
    found: dict[tuple, tuple[str, Setting, Run]] = {}
    recipes = None if args.recipes is None else tuple(args.recipes)
    for budget in args.budgets:
        paths = (args.model, args.calibration, work / "windows.npz", work)
        others = (args.mlx_optiq, args.sweep_windows, args.ggml, tuple(args.rates), recipes)
        setting = Setting(*paths, budget, *others)
        for method in args.methods:
            for run in METHODS[method](setting):
                name = (args.name, args.tokens, None if run.fixed else budget, run.label)
                if name in known or name in found:
                    continue
                if flag := missing_flag(run, known_flags()):
                    print(f"{run.label}: this version has no {flag}", file=sys.stderr)
                    continue
                found[name] = (method, setting, run)
    return list(found.values())


def ended(*_: object) -> None:
    """End the children with this process, when it is told to stop."""
    process.stop()
    os._exit(1)


def main() -> None:
    """Fill in the rows that are missing, then print all."""
    args = arguments()
    if not args.show:
        signal.signal(signal.SIGTERM, ended)
        signal.signal(signal.SIGINT, ended)
        with tempfile.TemporaryDirectory() as scratch:
            fill(args, args.work or Path(scratch))
    shown = [row for path in args.shown for row in rows.read(path)]
    printed = comparison.table(shown, args.kinds)
    if args.into:
        page = args.into.read_text(encoding="utf-8")
        args.into.write_text(
            comparison.placed(page, printed, [path.name for path in args.shown]), encoding="utf-8"
        )
    print(printed)
    files = sorted(rows.latest(shown), key=lambda row: (row["model"], row["bpw"] or 0))
    print("", rows.HEADER, *map(rows.line, files), sep="\n")


def fill(args: argparse.Namespace, work: Path) -> None:
    """Measure what is missing, several at once if asked."""
    work.mkdir(parents=True, exist_ok=True)
    script = str(HERE / "rivals" / "windows.py")
    paths = map(str, (args.model, args.calibration, work / "windows.npz"))
    subprocess.run([sys.executable, script, *paths], check=True)
    judge = Judge(args.model, args.texts, args.tokens, args.rows.with_suffix(".log"))
    try:
        with ThreadPoolExecutor(args.jobs) as pool:
            started = [
                pool.submit(row, args, method, setting, run, judge)
                for method, setting, run in missing(args, work)
            ]
            for one in started:
                one.result()
    finally:
        judge.close()


if __name__ == "__main__":
    main()
