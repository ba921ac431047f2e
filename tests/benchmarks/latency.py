"""Predicted against measured speed, after calibrating the machine.

    python tests/benchmarks/latency.py [--models 0.6b,4b,14b] [--dtypes bfloat16]
        [--layouts dense,8,4] [--prompt 2048] [--contexts 1024,16384,65536] [--tokens 64]
        [--runs 3] [--clock wall] [--chip CHIP] [--chip-file FILE] [--out FILE.jsonl]

A model is a Qwen3 architecture of random weights, so that nothing is downloaded, or a folder. It
reads a prompt, then generates behind a cache of each length, filled with random keys and values;
both through mlx-lm's ``generate_step``, the best of some runs. ``--clock process`` takes processor
time on both sides, for a CPU that others use too. The first line of the output is the machine as
it was measured, the last one the errors.
"""

import argparse
import importlib.metadata
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step, generation_stream
from mlx_lm.models import qwen3
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlx_optiq_ext.latency import (
    Chip,
    Header,
    Layout,
    Workload,
    demand,
    find_chip,
    layout_of,
    predict,
    write_chip,
)
from mlx_optiq_ext.latency.calibration import calibrate, summary

#: Hidden size, layers, heads, key and value heads, inner size, vocabulary, tied head.
SIZES = {
    "tiny": (256, 4, 4, 2, 1024, 4096, True),
    "0.6b": (1024, 28, 16, 8, 3072, 151936, True),
    "4b": (2560, 36, 32, 8, 9728, 151936, True),
    "14b": (5120, 40, 40, 8, 17408, 151936, False),
}
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
Clock = Callable[[], float]


def build(name: str, dtype: str, packing: str) -> tuple[nn.Module, Layout]:
    """A model in memory and its layout."""
    if name in SIZES:
        hidden, layers, heads, kv_heads, inner, vocabulary, tied = SIZES[name]
        config: dict[str, Any] = {
            "model_type": "qwen3", "hidden_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 128,
            "intermediate_size": inner, "vocab_size": vocabulary, "tie_word_embeddings": tied,
            "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 131072,
        }  # fmt: skip
        model: nn.Module = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    else:
        model, config = load_model(Path(name))
    model.set_dtype(getattr(mx, dtype))
    if packing != "dense":
        nn.quantize(model, group_size=64, bits=int(packing))
        config["quantization"] = {"group_size": 64, "bits": int(packing)}
    mx.eval(model.parameters())
    arrays: Any = tree_flatten(model.parameters())
    headers = {path: Header(str(a.dtype), tuple(a.shape), a.nbytes) for path, a in arrays}
    return model, layout_of(config, headers)


def read_prompt(model: Any, prompt: mx.array, clock: Clock) -> float:
    """Seconds until the first token after a prompt."""
    mx.synchronize(generation_stream)  # the last run's step ahead
    start = clock()
    next(iter(generate_step(prompt, model, max_tokens=1)))
    return clock() - start


def generate(model: Any, cache: list[Any], tokens: int, clock: Clock) -> float:
    """Seconds of a token of greedy generation behind a cache."""
    steps = generate_step(mx.array([1]), model, max_tokens=tokens + 1, prompt_cache=cache)
    next(steps)
    start = clock()
    for _ in steps:
        pass
    return (clock() - start) / tokens


def filled_cache(model: Any, layout: Layout, context: int) -> list[Any]:
    """A cache of random keys and values."""
    cache = make_prompt_cache(model)
    heads = layout.config.get("num_key_value_heads") or layout.config["num_attention_heads"]
    dtype = getattr(mx, layout.dtype)
    for layer, own in zip(cache, layout.caches, strict=True):
        shape = (1, heads, context, own.key_width // heads)
        layer.update_and_fetch(*(mx.random.normal(shape).astype(dtype) for _ in range(2)))
        mx.eval(layer.state)
    return cache


def cases(
    model: Any, layout: Layout, chips: list[Chip], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Each case with what was measured and predicted, in tokens per second."""
    clock, runs = CLOCKS[args.clock], args.runs
    vocabulary = layout.config["vocab_size"]
    if args.prompt:
        prompt = mx.random.randint(0, vocabulary, (args.prompt,))
        best = min(read_prompt(model, prompt, clock) for _ in range(runs + (runs > 1)))
        work = Workload(args.prompt, 1)
        yield {
            "case": "prompt",
            "tokens": args.prompt,
            "measured": args.prompt / best,
            "predicted": {c.id: predict(layout, c, work).prefill_tps for c in chips},
        }
    for context in args.contexts:
        cache = filled_cache(model, layout, context)
        mx.clear_cache()
        best = min(generate(model, cache, args.tokens, clock) for _ in range(runs))
        step = demand(layout, context + args.tokens)
        yield {
            "case": "generation",
            "tokens": context,
            "measured": 1 / best,
            "predicted": {c.id: 1 / sum(step.seconds(c).values()) for c in chips},
        }
        del cache
        mx.clear_cache()


def calibrated(args: argparse.Namespace) -> Chip:
    """This machine, measured now or as a file has it."""
    if args.chip_file is not None and args.chip_file.exists():
        return find_chip(str(args.chip_file))
    started = time.perf_counter()
    own = calibrate(clock=CLOCKS[args.clock])
    print(summary(own))
    print(f"calibrated in {time.perf_counter() - started:.1f} s", flush=True)
    if args.chip_file is not None:
        write_chip(args.chip_file, own)
    return own


def errors_of(rows: list[dict[str, Any]], chip: str) -> dict[str, Any]:
    """Median and largest relative error, of each kind of case and of all."""
    found: dict[str, Any] = {"chip": chip}
    for kind in ("prompt", "generation", "all"):
        chosen = [r for r in rows if kind in ("all", r["case"])]
        errors = np.abs([r["predicted"][chip] / r["measured"] - 1 for r in chosen])
        if len(errors):
            found[kind] = {
                "cases": len(errors),
                "median": round(float(np.median(errors)), 4),
                "largest": round(float(errors.max()), 4),
            }
    return found


def main() -> None:
    """Print a line for each case, and write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default="0.6b,4b,14b")
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--layouts", default="dense,8,4")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument(
        "--contexts",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[1024, 16384, 65536],
    )
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--chip", help="predict for this one beside the calibrated machine")
    parser.add_argument("--chip-file", type=Path, help="keep the calibration, or take it from here")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    started = time.perf_counter()
    own = calibrated(args)
    chips = [own, *([find_chip(args.chip)] if args.chip else [])]
    command = shlex.join(["python", "tests/benchmarks/latency.py", *sys.argv[1:]])
    lines: list[dict[str, Any]] = [
        {
            "machine": own.name,
            "processor": platform.processor() or platform.machine(),
            "mlx": importlib.metadata.version("mlx"),
            "command": command,
            "chip": own,
        }
    ]
    rows: list[dict[str, Any]] = []
    for name in args.models.split(","):
        for dtype in args.dtypes.split(","):
            for packing in args.layouts.split(","):
                model, layout = build(name, dtype, packing)
                for row in cases(model, layout, chips, args):
                    row = {"model": Path(name).name, "dtype": dtype, "layout": packing, **row}
                    rows.append(row)
                    print(json.dumps(row, default=float), flush=True)
                del model
                mx.clear_cache()
    lines += rows
    lines += [errors_of(rows, chip.id) for chip in chips]
    lines[-1]["seconds"] = round(time.perf_counter() - started, 1)
    for line in lines[-len(chips) :]:
        print(json.dumps(line))
    if args.out is not None:
        args.out.write_text("".join(json.dumps(line, default=vars) + "\n" for line in lines))


if __name__ == "__main__":
    main()
