"""Milliseconds that the host takes to build a decoding step under KV plans, and nodes of its graph.

    python tests/benchmarks/kv/host_time.py [--plans 16 8 4 mixed] [--layers 36] [--repeats 5]
        [--batch 1]

A random model with the layers and heads of Qwen3-4B and tiny matrices, on the CPU; packed caches
take the way of a GPU, whose kernels are only nodes of the graph here. The plans take turns. A time
is this thread's on the processor, a median with its minimum and maximum; ``x`` is the median beside
the first plan's. Nodes are those of a layer: a kernel of our own is a ``Depends``, and slices and
reshapes launch nothing.
"""

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from decoding import cell, formats_of, model_of, read, turns

from mlx_optiq_ext.kv.formats import Affine, KeyTransform

sys.path.append(str(Path(__file__).parents[2]))
#: Tokens of the prompt, and steps that are built in a turn.
PROMPT, STEPS = 32, 6


def caches_of(model: Any, plan: str, layers: int, batch: int) -> list[Any]:
    """Caches of a short prompt, packed ones with kernels that are only nodes."""
    from kernel_shim import node_factory
    from mlx_lm.models.cache import KVCache

    from mlx_optiq_ext.kv import PackedKVCache, Platform

    gpu, rng = Platform("cuda", node_factory()), np.random.default_rng(0)
    centre, basis = (rng.random((8, n, 128), np.float32) for n in (1, 128))
    moved = KeyTransform(centre, basis)
    caches: list[Any] = [KVCache() for _ in range(layers)]
    for index, formats in enumerate(formats_of(plan, layers)):
        if isinstance(formats.keys, Affine) and formats.keys.transformed:
            formats = formats.with_transform(moved)
        caches[index] = PackedKVCache(caches[index], formats, stacked=True, platform=gpu)
    if batch > 1:
        caches = [cache.merge([cache] * batch) for cache in caches]
    read(model, caches, mx.zeros((batch, PROMPT), mx.int32))
    step(model, caches, batch)
    return caches


def step(model: Any, caches: list[Any], batch: int) -> float:
    """Seconds of this thread to build a step, which is computed after that."""
    tokens = mx.zeros((batch, 1), mx.int32)
    mx.eval(tokens)
    start = time.thread_time()
    output = model(tokens, cache=caches)
    took = time.thread_time() - start
    mx.eval(output)
    return took


def nodes_of(*outputs: mx.array) -> Counter[str]:
    """Operations that arrays still wait for, by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), *outputs)
        return Counter(re.findall(r'label ="([^"]+)", shape=rectangle', path.read_text()))


def main() -> None:
    """Print a row a plan."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plans", nargs="*", default=["16", "8", "4", "mixed"])
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    model = model_of(args.layers, tiny=True)
    held = {plan: caches_of(model, plan, args.layers, args.batch) for plan in args.plans}
    times: dict[str, list[float]] = {plan: [] for plan in held}
    for plan in turns(list(held), args.repeats):
        taken = [step(model, held[plan], args.batch) for _ in range(STEPS)]
        times[plan].append(1e3 * statistics.median(taken))
    base = statistics.median(times[args.plans[0]])
    print("| plan | build, ms | x | nodes a layer | which |\n|---|---|---|---|---|")
    for plan, found in times.items():
        nodes = nodes_of(model(mx.zeros((args.batch, 1), mx.int32), cache=held[plan]))
        each = sorted(((n / args.layers, kind) for kind, n in nodes.items()), reverse=True)
        kinds = ", ".join(f"{n:.3g} {kind}" for n, kind in each if n >= 0.5)
        total, ratio = sum(nodes.values()) / args.layers, statistics.median(found) / base
        print(f"| {plan} | {cell(found)} | {ratio:.2f} | {total:.1f} | {kinds} |", flush=True)


if __name__ == "__main__":
    main()
