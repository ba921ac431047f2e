"""What designs of rounding leave of the loss's curvature, tensor by tensor, on a real model.

    python tests/benchmarks/weights/roundings.py MODEL --calibration FILE [--layers N ...]
        [--rows N] [--sequences N] [--designs NAME ...] [--budgets N ...] [--report FILE.jsonl]

Measures the moments of every tensor's inputs and output gradients on some sequences, and again on
others of the same text. Some rows of each tensor are then rounded in several ways. A JSON line has
what each way leaves, ``0.5 tr(G E H E^T)`` in nats per token, on both texts. Designs:

  candidates   bits and group sizes: rounded by MLX, as `taylor` predicts refinement, refined
  damping      of the inputs' moment
  nvfp4        4 bits with 16 values a scale, with a search of scales and error feedback of its own
  scales       channel scales from the inputs' mean squares, folded into the layer before
  orders       channels of down_proj by the norm of its columns, with scales and without
  rotations    each head's v and o rotated (Hadamard, or eigenvectors of the inputs' moment)
  embedding    a tied embedding against its roles as head and look-up, alone, together and by row
  plans        plans by the prediction, and by what some rows are left with: refined, and judged
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from designs import nvfp4
from designs.invariances import orders, rotations, scales
from designs.tensors import KINDS, Model, Tensor, reduced, rounded

from mlx_optiq_ext.weights.plan_search import Study, variants
from mlx_optiq_ext.weights.precision import Precision, dequantized
from mlx_optiq_ext.weights.rounding.metric import DAMPING, Metric
from mlx_optiq_ext.weights.rounding.refinement import judge, refine
from mlx_optiq_ext.weights.sensitivity.taylor import Taylor

TOGETHER = {"q, k, v": KINDS[:3], "o": KINDS[3:4], "gate, up": KINDS[4:6], "down": KINDS[6:]}
DESIGNS = ["candidates", "damping", "nvfp4", "scales", "orders", "rotations", "embedding", "plans"]
#: A design, what it is of, and the work.
Task = tuple[str, object, Callable[[], dict]]


def candidates(tensor: Tensor, widths=(2, 3, 4, 5, 6, 8), sizes=(32, 64, 128)) -> dict:
    """Bits and group sizes."""
    diagonal, found = reduced(tensor.moments[0]), {}
    for bits in widths:
        for size in sizes:
            precision = Precision(bits, size)
            if precision.fits(tensor.weight.shape):
                plain = mx.array(tensor.weight).astype(mx.bfloat16)
                error = tensor.weight - np.array(dequantized(plain, precision, mx.float32))
                predicted = float(tensor.gradients @ (np.square(error) @ diagonal)) * tensor.unit
                found[str(precision)] = {
                    "plain": tensor.left(error),
                    "predicted": predicted,
                    "refined": tensor.refined(precision),
                }
    return found


def damping(tensor: Tensor) -> dict:
    """Shares of the mean diagonal on the diagonal, besides the library's own."""
    found, own = {}, tensor.moments[0]
    mean, middle = (f(np.diagonal(own)) for f in (np.mean, np.median))
    for name, more in {
        "0.005": 0.005 * mean,
        "0.001": 0.001 * mean,
        "median": 0.1 * middle,
    }.items():
        moment = own + np.eye(len(own), dtype=np.float32) * (more - DAMPING * mean)
        found[name] = tensor.refined(Precision(4, 64), metric=Metric(mx.array(moment)))
    return {"0.02": tensor.refined(Precision(4, 64)), **found}


def four_bits(tensor: Tensor) -> dict:
    """nvfp4 beside affine 4 bits, before and after coordinate descent."""
    found = {}
    for size in (64, 32):
        for sweeps in (0, 2):
            left = tensor.refined(Precision(4, size), sweeps=sweeps)
            found[f"affine g{size}, {sweeps} sweeps"] = left
    for sweeps in (0, 2):
        error = tensor.weight - nvfp4.rounded(tensor.weight, tensor.moments[0], sweeps)
        found[f"nvfp4, {sweeps} sweeps"] = tensor.left(error)
    return found


def embedding(model: Model, rows: int) -> dict:
    """A tied embedding; rows are drawn by their weight, and count by its inverse."""
    path = next((p for p, f in model.texts[0].items() if "columns" in f and "inputs" in f), None)
    if path is None:
        return {}
    own, other = (text[path] for text in model.texts)
    weight = model.weights[path]
    importance = own["lookups"] * np.trace(own["columns"]) + own["outputs"] * np.trace(
        own["inputs"]
    )
    chance = 0.5 * importance / importance.sum() + 0.5 / len(importance)
    at = np.random.default_rng(0).choice(len(chance), rows, replace=False, p=chance)
    counts = 1 / (1 - (1 - chance[at]) ** rows)
    some = np.array(weight[mx.array(at)].astype(mx.float32))

    def left(error: np.ndarray) -> list[float]:
        def role(text: dict, by: str, of: str) -> float:
            return 0.5 * float((text[by][at] * counts) @ ((error @ text[of]) * error).sum(axis=1))

        every = [
            (t, *r) for t in (own, other) for r in (("lookups", "columns"), ("outputs", "inputs"))
        ]
        return [role(*each) for each in every]

    def together(rows: np.ndarray) -> np.ndarray:
        rare = own["lookups"] + 0.1 * own["lookups"].mean()
        return own["columns"] * rare[rows].mean() + own["inputs"] * own["outputs"][rows].mean()

    ratio = (own["lookups"] + 0.1 * own["lookups"].mean()) / (own["outputs"] + 1e-30)
    found: dict[str, list] = {
        "roles": ["look-up", "head", "look-up on other text", "head on other text"]
    }
    for bits in (3, 4, 5, 6):
        precision = Precision(bits, 64)
        ways = {
            "both": together(np.arange(len(ratio))),
            "head": own["inputs"],
            "look-up": own["columns"],
        }
        for name, moment in ways.items():
            found[f"{bits} bits, {name}"] = left(
                some - rounded(some, Metric(mx.array(moment)), precision)
            )
        error = np.empty_like(some)
        for part in np.array_split(np.argsort(ratio[at]), 4):
            metric = Metric(mx.array(together(at[part])))
            error[part] = some[part] - rounded(some[part], metric, precision)
        found[f"{bits} bits, rows in 4 classes"] = left(error)
    return found


def plans(model: Model, budgets: list[float], sequences: int) -> dict:
    """Plans by what `taylor` predicts, and by the share of it that 64 rows are left with.

    Each is refined and judged: the sum that it was made by, and the KL on held-out sequences.
    """
    problem, found = model.problem, {}
    predicted = Taylor().measure(problem)
    shares = {}
    for tensor in model.every(sequences, 64):
        left = candidates(tensor, (2, 4), (64,))
        shares[tensor.path] = [e["refined"][0] / e["predicted"] for e in left.values()]

    def share(path: str, bits: int) -> float:
        return float(np.exp(np.interp(bits, (2, 4), np.log(shares[path]))))

    remaining = {
        path: {p: kl * (share(path, p.bits) if p.quantized else 1.0) for p, kl in costs.items()}
        for path, costs in predicted.items()
    }
    for budget in budgets:
        for name, costs in {"predicted": predicted, "remaining": remaining}.items():
            plan = variants(Study(problem, costs, "taylor"), budget)["allocated"]
            found[f"{budget} bits, {name}"] = {
                "predicted": sum(predicted[path][p] for path, p in plan.items()),
                "remaining": sum(remaining[path][p] for path, p in plan.items()),
                "kl": judge(problem, plan, refine(problem, plan)),
                "plan": {path: str(p) for path, p in plan.items()},
            }
    return found


def every(model: Model, args: argparse.Namespace) -> Iterator[Task]:
    """All that can be measured: a design, what of, and the work."""
    decoder: Any = model.model
    rows, heads = args.rows, decoder.args.num_key_value_heads
    yield "embedding", "embedding", partial(embedding, model, 50 * rows)
    for index in args.layers:
        layer, whole = model.layer(index, rows), model.layer(index, 1 << 30)
        for tensor in layer.values():
            yield "candidates", tensor.path, partial(candidates, tensor)
            yield "damping", tensor.path, partial(damping, tensor)
            yield "nvfp4", tensor.path, partial(four_bits, tensor)
        for name, kinds in TOGETHER.items():
            shared = (heads, len(whole["v_proj"].weight) // heads) if name == "o" else None
            yield "scales", [index, name], partial(scales, [layer[k] for k in kinds], shared)
        down, v, o = (whole[kind] for kind in ("down_proj", "v_proj", "o_proj"))
        work = partial(orders, layer["down_proj"], down.weight, down.gradients)
        yield "orders", down.path, work
        across = [[text[t.path]["across"] for text in model.texts] for t in (v, o)]
        yield "rotations", index, partial(rotations, v, o, *across, heads)
    yield "plans", "all", partial(plans, model, args.budgets, args.sequences)


def main() -> None:
    """Print one line a tensor or layer and design."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 5, 14, 28, 29])
    parser.add_argument("--rows", type=int, default=32, help="of each tensor")
    parser.add_argument("--sequences", type=int, default=48, help="of 256 tokens, of each text")
    parser.add_argument("--designs", nargs="+", default=DESIGNS, choices=DESIGNS)
    parser.add_argument("--budgets", type=float, nargs="+", default=[4.5, 4.0, 3.5, 3.0])
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()

    def say(**row: object) -> None:
        line = json.dumps({name: brief(each) for name, each in row.items()})
        print(line, flush=True)
        if args.report:
            with args.report.open("a") as stream:
                stream.write(line + "\n")

    say(command=" ".join(sys.argv))
    model = Model(args.model, args.calibration, args.sequences, args.layers)
    for design, of, work in every(model, args):
        if design in args.designs:
            say(design=design, of=of, left=work())


def brief(found: object) -> object:
    """Numbers to four digits."""
    if isinstance(found, dict):
        return {name: brief(each) for name, each in found.items()}
    if isinstance(found, list):
        return [brief(each) for each in found]
    return float(f"{found:.4g}") if isinstance(found, float) else found


if __name__ == "__main__":
    main()
