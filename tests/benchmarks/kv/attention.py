"""One decode step's attention over packed keys and values, beside fused 16-bit attention.

    python tests/benchmarks/kv/attention.py [--lengths 4096 16384 65536] [--batch 1] [--specs 8 4]

32 query heads, 8 heads of 128, bfloat16. A time is the slope over chains of calls that each take
the one before's output as queries, so that launch and synchronisation cancel; the median of
several. The chain's graph is built before its clock starts, as generation builds a step's while the
one before runs; ``build`` is that time a call. ``stock`` is mlx-lm's own quantized attention.
``floor`` is the time in which the card copies the packed bytes (measured first), ``error`` the
relative error against a float64 reference on the same packed data, in float32 where a kernel of
ours runs.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

HEADS, QUERY_HEADS, DIM = 8, 32, 128
SCALE = DIM**-0.5
#: Calls in the short and in the long chain, and how often both are timed.
SHORT, LONG, REPEATS = 20, 120, 5


def slope(step: Callable[[mx.array], mx.array], start: mx.array) -> tuple[float, float]:
    """Seconds a call: to compute it, and to build its graph."""

    def run(count: int) -> np.ndarray:
        value = start
        begin = time.perf_counter()
        for _ in range(count):
            value = step(value)
        built = time.perf_counter()
        mx.eval(value)
        return np.array([time.perf_counter() - built, built - begin])

    run(LONG)
    found = [(run(LONG) - run(SHORT)) / (LONG - SHORT) for _ in range(REPEATS)]
    computed, built = np.median(found, axis=0)
    return float(computed), float(built)


def copy_rate() -> float:
    """Bytes read and written a second by a copy of 2 GiB (a 64th of that on a CPU)."""
    count = 2**30 if mx.default_device() == mx.gpu else 2**24
    array = mx.zeros((count,), mx.uint16)
    mx.eval(array)
    return 4 * count / slope(lambda a: a + 1, array)[0]


def error(found: mx.array, queries: mx.array, keys: mx.array, values: mx.array) -> float:
    """Relative to the float64 result over plain keys and values, as a norm over the first row."""
    out, q, k, v = (
        np.array(a[:1].astype(mx.float32)).astype(np.float64)
        for a in (found, queries, keys, values)
    )
    total = reference = 0.0
    repeats = q.shape[1] // k.shape[1]
    for head in range(k.shape[1]):
        rows = slice(head * repeats, (head + 1) * repeats)
        scores = q[0, rows, 0] @ k[0, head].T * SCALE
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = weights @ v[0, head] / weights.sum(-1, keepdims=True)
        total += ((out[0, rows, 0] - expected) ** 2).sum()
        reference += (expected**2).sum()
    return (total / reference) ** 0.5


def measure(name: str, spec: str, data: tuple[mx.array, ...], rate: float) -> dict:
    """Time one way to attend to data in one form."""
    from mlx_lm.models import base

    from mlx_optiq_ext import kv
    from mlx_optiq_ext.kernels import platform
    from mlx_optiq_ext.kv.attention import dispatch

    queries, keys, values = data
    row = {"name": name, "spec": spec, "tokens": keys.shape[2], "batch": keys.shape[0]}
    if name == "fused":
        step = lambda q: mx.fast.scaled_dot_product_attention(q, keys, values, scale=SCALE)  # noqa: E731
        row["bytes"], found, stored = keys.nbytes + values.nbytes, step(queries), (keys, values)
    elif name == "stock":
        bits = int(spec)
        parts = [mx.quantize(a, group_size=64, bits=bits) for a in (keys, values)]
        mx.eval(parts)
        step = lambda q: base.quantized_scaled_dot_product_attention(  # noqa: E731
            q, *parts, scale=SCALE, mask=None, group_size=64, bits=bits
        )
        stored = [mx.dequantize(*p, group_size=64, bits=bits) for p in parts]
        row["bytes"], found = sum(a.nbytes for p in parts for a in p), step(mx.array(queries))
    else:
        plan = kv.parse_spec(spec)
        assert plan is not None
        assert plan.everywhere is not None
        sides = (plan.everywhere.keys, plan.everywhere.values)
        formats = [side.fitted(DIM) for side in sides if side]
        packed = [kv.Packed(f.pack(a), f) for f, a in zip(formats, (keys, values), strict=True)]
        mx.eval([p.parts for p in packed])
        # In the stored basis: the rotation of a query is a kernel of its own.
        attend: Any = dispatch.choose(platform.current(), queries, packed[0], packed[1], None)
        step = lambda q: attend(q, *packed, SCALE, None, None)  # noqa: E731
        row["bytes"] = sum(p.nbytes for p in packed)
        ours = isinstance(attend, partial)
        row["kernel"] = "ours" if ours else attend.__module__
        exact = partial(attend, dtype=mx.float32) if ours else attend
        found = exact(queries, *packed, SCALE, None, None)
        stored = [p.stored(mx.float32) for p in packed]
    mx.eval(found)
    row["error"] = error(found, queries, *stored)
    seconds, built = slope(step, mx.array(queries))  # mlx-lm scales queries in place
    row["ms"], row["build"] = 1e3 * seconds, 1e3 * built
    row["floor"] = row["bytes"] / rate / (row["ms"] / 1e3)
    return row


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 16384, 65536])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--specs", nargs="*", default=["8", "k8v4", "4p", "4t"])
    parser.add_argument("--stock", nargs="*", default=[], help="bits to time mlx-lm's own at")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON lines")
    args = parser.parse_args()
    rate = copy_rate()
    cpu = mx.default_device() == mx.Device(mx.cpu)
    dtype = mx.float32 if cpu else mx.bfloat16
    print(f"copies at {rate / 1e12:.2f} TB/s\n")
    print("| tokens | batch | cache | ms | x fused | part of the floor | error | build, ms |")
    print("|---|---|---|---|---|---|---|---|")
    for tokens in args.lengths:
        shape = (args.batch, HEADS, tokens, DIM)
        queries = mx.random.normal((args.batch, QUERY_HEADS, 1, DIM)).astype(dtype)
        data = (queries, *(mx.random.normal(shape).astype(dtype) for _ in range(2)))
        mx.eval(data)
        fused = 0.0
        cases = [
            ("fused", "16"),
            *(("stock", b) for b in args.stock),
            *(("ours", s) for s in args.specs),
        ]
        for name, spec in cases:
            row = measure(name, spec, data, rate)
            fused = fused or row["ms"]
            label = spec if name == "ours" else f"{name} {spec}"
            figures = f"{row['ms']:.4f} | {row['ms'] / fused:.2f} | {row['floor']:.2f}"
            figures += f" | {row['error']:.1e} | {row['build']:.4f}"
            print(f"| {tokens} | {args.batch} | {label} | {figures} |", flush=True)
            if args.out:
                with args.out.open("a") as stream:
                    stream.write(json.dumps({**row, "rate": rate}) + "\n")


if __name__ == "__main__":
    main()
