"""Predicted against measured decoding of random-weight models, after calibrating the machine.

    python tests/benchmarks/latency.py [--sizes 0.6b,4b,14b] [--layouts bf16,8,4]
        [--contexts 1024,16384,65536] [--tokens 64] [--chip auto]

Qwen3 architectures of three sizes are built with random weights, so that nothing is downloaded.
Each context is filled with random tokens, and the best of three runs of greedy steps counts.
"""

import argparse
import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from mlx_lm.models.cache import make_prompt_cache

from mlx_optiq_ext.latency import Chip, Header, Layout, demand, find_chip, layout_of
from mlx_optiq_ext.latency.calibration import calibrate, summary

#: Hidden size, layers, heads, key and value heads, inner size, vocabulary, tied head.
SIZES = {
    "tiny": (256, 4, 4, 2, 1024, 4096, True),
    "0.6b": (1024, 28, 16, 8, 3072, 151936, True),
    "4b": (2560, 36, 32, 8, 9728, 151936, True),
    "14b": (5120, 40, 40, 8, 17408, 151936, False),
}
RUNS = 3


def build(size: str, packing: str) -> tuple[nn.Module, Layout]:
    """A random model in memory and its layout."""
    hidden, layers, heads, kv_heads, inner, vocabulary, tied = SIZES[size]
    config: dict[str, Any] = {
        "model_type": "qwen3", "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 128,
        "intermediate_size": inner, "vocab_size": vocabulary, "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 131072,
    }  # fmt: skip
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    dtype = mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16
    model.set_dtype(dtype)
    config["dtype"] = str(dtype).rpartition(".")[2]
    if packing != "bf16":
        nn.quantize(model, group_size=64, bits=int(packing))
        config["quantization"] = {"group_size": 64, "bits": int(packing)}
    mx.eval(model.parameters())
    arrays: Any = tree_flatten(model.parameters())
    headers = {path: Header(str(a.dtype), tuple(a.shape), a.nbytes) for path, a in arrays}
    return model, layout_of(config, headers)


def measured(model: Any, context: int, tokens: int, vocabulary: int) -> float:
    """Tokens per second of greedy steps behind a prompt of random tokens."""
    cache = make_prompt_cache(model)
    prompt = mx.random.randint(0, vocabulary, (1, context))
    for start in range(0, context, 2048):
        model(prompt[:, start : start + 2048], cache=cache)
        mx.eval([c.state for c in cache])
        mx.clear_cache()
    best = float("inf")
    for _ in range(RUNS):
        token = mx.array([[1]])
        mx.eval(token)
        start = time.perf_counter()
        for _ in range(tokens):
            # One step ahead, as mlx-lm generates.
            token = mx.argmax(model(token, cache=cache)[:, -1], axis=-1)[:, None]
            mx.async_eval(token)
        mx.eval(token)
        best = min(best, time.perf_counter() - start)
    return tokens / best


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", default="0.6b,4b,14b")
    parser.add_argument("--layouts", default="bf16,8,4")
    parser.add_argument("--contexts", default="1024,16384,65536")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--chip", help="predict for this one beside the calibrated machine")
    args = parser.parse_args()
    own = calibrate()
    print(summary(own), flush=True)
    chips: list[Chip] = [own, *([find_chip(args.chip)] if args.chip else [])]
    errors: dict[str, list[float]] = {chip.id: [] for chip in chips}
    for size in args.sizes.split(","):
        for packing in args.layouts.split(","):
            model, layout = build(size, packing)
            for context in map(int, args.contexts.split(",")):
                found = measured(model, context, args.tokens, SIZES[size][5])
                line = f"{size:>5} {packing:>4} {context:>6}: {found:8.2f} tokens/s measured"
                for chip in chips:
                    step = demand(layout, context + args.tokens).seconds(chip)
                    predicted = 1 / sum(step.values())
                    errors[chip.id].append(predicted / found - 1)
                    line += f", {predicted:8.2f} ({errors[chip.id][-1]:+.0%}) {chip.id}"
                print(line, flush=True)
            del model
            mx.clear_cache()
    for name, values in errors.items():
        size = np.abs(values)
        print(f"{name}: median error {np.median(size):.1%}, largest {size.max():.1%}")


if __name__ == "__main__":
    main()
