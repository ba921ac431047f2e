"""Time and peak memory of budgeted conversions of three model sizes, and what 9B would take.

    python tests/benchmarks/weights/scaling.py --calibration FILE
        [--tokenizer tests/data/tiny-qwen3] [--sizes 384x12 640x20 1024x32] [--methods taylor]
        [--budget 4.0] [--report FILE.json]

Models of Qwen3's shape with random weights, WIDTHxLAYERS, whose embedding is the same share of the
whole at every size; the calibration tokens are the same too. Each is converted in a process of its
own with nothing measured beforehand. Planning is what ``mlx_lm.convert`` says it took, the whole is
measured from outside, with writing the model. ``--report`` keeps what was found, and a later run
measures only what is not in it. A ``*`` says that other programs used more than a quarter of a core
meanwhile; processor seconds suffer less from that.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rivals.process import measure

HERE = Path(__file__).parent
TINY = HERE.parents[1] / "data" / "tiny-qwen3"
BIG = 9e9

#: Share of the parameters in the embedding: ref-24m's.
SHARE = 0.13


def shape(text: str) -> tuple[int, int]:
    """Width and layers."""
    width, layers = text.split("x")
    return int(width), int(layers)


def vocabulary(width: int, layers: int) -> int:
    """Rows of an embedding that is `SHARE` of the model, in thousands of 1024."""
    inner = 11.5 * width**2 * layers
    return max(round(inner * SHARE / (1 - SHARE) / width / 1024), 1) * 1024


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log value over log size by least squares; 1 is linear."""
    x, y = [math.log(v) for v in sizes], [math.log(v) for v in values]
    return slope(x, y)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the line through points by least squares."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def line(sizes: Sequence[float], values: Sequence[float]) -> Callable[[float], float]:
    """The line through points by least squares."""
    rise = slope(sizes, values)
    start = sum(values) / len(values) - rise * sum(sizes) / len(sizes)
    return lambda size: start + rise * size


def convert(args: argparse.Namespace, size: str, method: str, folder: Path) -> dict[str, Any]:
    """Generate a model and convert it."""
    width, layers = shape(size)
    model, log = folder / size, folder / f"{size}-{method}.log"
    if not model.exists():
        script = str(HERE / "rivals" / "generated.py")
        command = [sys.executable, script, str(model), "--tokenizer", str(args.tokenizer)]
        command += ["--hidden", str(width), "--layers", str(layers)]
        command += ["--vocabulary", str(vocabulary(width, layers))]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        (folder / f"{size}.parameters").write_text(done.stdout)
    cost = measure(
        sys.executable,
        *("-m", "mlx_lm", "convert", "--hf-path", str(model)),
        *(
            "--mlx-path",
            str(folder / f"{size}-{method}"),
            "--optiq-effort",
            "plan",
            "--optiq-budget",
            str(args.budget),
        ),
        *("--optiq-sensitivity", method, "--optiq-calibration", str(args.calibration.absolute())),
        environment={"MLX_OPTIQ_EXT_CACHE": str(folder / f"cache-{size}-{method}")},
        log=log,
    )
    if cost.failure is not None:
        raise SystemExit(f"{size}: {cost.failure}")
    planned = re.search(r"Planned in ([\d.]+) s", log.read_text())
    return {
        "size": size,
        "method": method,
        "parameters": int((folder / f"{size}.parameters").read_text()),
        "planned": float(planned[1]) if planned else cost.seconds,
        "bytes": sum(path.stat().st_size for path in model.glob("*.safetensors")),
        "cost": asdict(cost),
        "contended": cost.contended,
    }


def report(rows: list[dict[str, Any]], method: str) -> list[str]:
    """A line a size, the exponents, and the line through them continued to 9B."""
    rows = sorted((r for r in rows if r["method"] == method), key=lambda r: r["parameters"])
    text = [
        f"{method}, {row['parameters'] / 1e6:.0f} M parameters ({row['bytes'] / 2**30:.2f} GiB): "
        f"planned in {row['planned']:.1f} s, {row['cost']['seconds']:.1f} s in all"
        f"{'*' if row['contended'] else ''}, {row['cost']['processor']:.1f} processor s, "
        f"peak {row['cost']['resident_gib']:.2f} GiB"
        for row in rows
    ]
    if len(rows) < 2:
        return text
    sizes = [row["parameters"] for row in rows]
    for name, unit, values in (
        ("planning", "s", [row["planned"] for row in rows]),
        ("all", "s", [row["cost"]["seconds"] for row in rows]),
        ("processor", "s", [row["cost"]["processor"] for row in rows]),
        ("peak", "GiB", [row["cost"]["resident_gib"] for row in rows]),
    ):
        text.append(
            f"{method}, {name}: grows as parameters to the {exponent(sizes, values):.2f}; "
            f"9 B on the line through these: {line(sizes, values)(BIG):,.0f} {unit}"
        )
    text.append(
        "The extrapolation assumes this machine, the same calibration tokens, the same share of "
        "the embedding, and that time and memory stay on that line beyond the sizes measured."
    )
    return text


def main() -> None:
    """Measure what is missing, then print all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, default=TINY)
    parser.add_argument("--sizes", nargs="+", default=["384x12", "640x20", "1024x32"])
    parser.add_argument("--methods", nargs="+", default=["taylor"])
    parser.add_argument("--budget", type=float, default=4.0)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    rows = []
    if args.report is not None and args.report.exists():
        rows = json.loads(args.report.read_text())
    with tempfile.TemporaryDirectory() as folder:
        for method in args.methods:
            for size in args.sizes:
                if any((row["size"], row["method"]) == (size, method) for row in rows):
                    continue
                rows.append(convert(args, size, method, Path(folder)))
                print(report(rows[-1:], method)[0], flush=True)
                if args.report is not None:
                    args.report.write_text(json.dumps(rows, indent=1))
    for method in args.methods:
        print("\n".join(report(rows, method)))


if __name__ == "__main__":
    main()
