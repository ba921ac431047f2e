"""Time of the ways to measure sensitivity, on the same calibration tokens, and their plans' KL.

    python tests/benchmarks/weights/sensitivity.py MODEL --calibration FILE [--text FILE]
        [--budgets 4.5 4.0 3.5 3.0] [--windows 16] [--methods taylor kl plain mlx-optiq]
        [--mlx-optiq VENV] [--bits 2 3 4 5 6 8] [--report FILE.json]

``plain`` measures every candidate with a forward pass of the whole model. mlx-optiq 0.7.7 (see
rivals/mlx_optiq.py for its environment) measures ``--bits`` at one group size, this package all of
its bits and group sizes. Three in four sequences of 256 tokens are measured on; ``--windows`` cuts
them for all. Each method runs in a process of its own; only the measurement counts, not the
loading. ``--report`` keeps what was found, and a later run measures only what is not in it. A
``*`` says that other programs used more than a quarter of a core meanwhile; processor seconds
suffer less from that.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rivals.process import Cost, measure

RIVALS = Path(__file__).parent / "rivals"

#: (what, slower, faster, least ratio of their times)
TARGETS = (
    ("kl / taylor", "kl", "taylor", 5),
    ("plain / kl", "plain", "kl", 2),
    ("mlx-optiq / taylor", "mlx-optiq", "taylor", 10),
    ("mlx-optiq / kl", "mlx-optiq", "kl", 10),
)


def sweep(args: argparse.Namespace, method: str, folder: Path) -> dict[str, Any]:
    """Run one method in a process of its own."""
    out = folder / f"{method}.json"
    windows = ["--windows", str(args.windows)]
    if method == "mlx-optiq":
        tokens = str(folder / "windows.npz")
        paths = (str(args.model), str(args.calibration), tokens)
        script = str(RIVALS / "windows.py")
        subprocess.run([sys.executable, script, *paths, *windows], check=True)
        cost = measure(
            args.mlx_optiq / "bin" / "python",
            *(str(RIVALS / "mlx_optiq.py"), str(args.model), tokens, str(out)),
            *("--bits", *map(str, args.bits)),
            environment={"PYTHONPATH": ""},
        )
        out = out.with_suffix(".timing")
    else:
        paths = (str(args.model), str(args.calibration), str(out))
        judged = ["--text", str(args.text), "--budgets", *map(str, args.budgets)]
        if args.text is None or method == "plain":
            judged = []
        cost = measure(sys.executable, str(RIVALS / "sweep.py"), method, *paths, *windows, *judged)
    return {**finished(cost, out), "windows": args.windows}


def finished(cost: Cost, out: Path) -> dict[str, Any]:
    """What a child reported, and what its process took."""
    if cost.failure is not None:
        raise SystemExit(cost.failure)
    return {**json.loads(out.read_text()), "process": asdict(cost), "contended": cost.contended}


def lines(found: dict[str, dict[str, Any]]) -> list[str]:
    """The print-out: times, their ratios, and the KL of plans."""
    text = [
        f"{method}: {row['seconds']:.1f} s{'*' if row['contended'] else ''}, "
        f"{row['processor']:.1f} processor s, peak {row['process']['resident_gib']:.2f} GiB "
        f"({row['windows']} windows)"
        for method, row in found.items()
    ]
    for name, slower, faster, least in TARGETS:
        if slower in found and faster in found:
            wall, used = (
                found[slower][key] / found[faster][key] for key in ("seconds", "processor")
            )
            text.append(f"{name}: {wall:.1f} x, {used:.1f} x by processor (target {least} x)")
    plans = [found.get(method, {}).get("kl", {}) for method in ("taylor", "kl")]
    for budget in (b for b in plans[0] if b in plans[1]):
        ours, direct = plans[0][budget], plans[1][budget]
        text.append(
            f"plans at {budget}: KL {ours:.5f} with taylor, {direct:.5f} with kl "
            f"({ours / direct:.3f} x, target 1.1 x)"
        )
    return text


def main() -> None:
    """Measure what is missing, then print all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--budgets", type=float, nargs="+", default=[4.5, 4.0, 3.5, 3.0])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--methods", nargs="+", default=["taylor", "kl", "plain", "mlx-optiq"])
    parser.add_argument("--mlx-optiq", type=Path, metavar="VENV")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    found = {}
    if args.report is not None and args.report.exists():
        found = json.loads(args.report.read_text())
    with tempfile.TemporaryDirectory() as folder:
        for method in args.methods:
            if method in found or (method == "mlx-optiq" and args.mlx_optiq is None):
                continue
            found[method] = sweep(args, method, Path(folder))
            print(lines({method: found[method]})[0], flush=True)
            if args.report is not None:
                args.report.write_text(json.dumps(found, indent=1))
    print("\n".join(lines(found)))


if __name__ == "__main__":
    main()
