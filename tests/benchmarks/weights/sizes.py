"""Seconds and peak memory of default conversions of generated models of published shapes.

    python tests/benchmarks/weights/sizes.py [--models qwen3-0.6b qwen3-4b:4 qwen3-8b:3 ...]
        [--sequences 128] [--length 512] [--budget 4.5] [--effort refine]
        [--tokenizer tests/data/tiny-qwen3] [--report FILE.json]

NAME:LAYERS writes a model of fewer decoder layers. Weights are random, of the variance that keeps
activations as they are, and what is added to the hidden state shrinks with depth as in a trained
model. The calibration text is random words. Each model is converted by ``mlx_lm.convert`` in a
process of its own with nothing measured beforehand, on ``--sequences`` of ``--length`` tokens.

Prints a JSON line a model: parameters, seconds by phase, seconds a layer and a parameter, the peak
of MLX's allocator while it is measured and refined and while it is written, and the bound on it:
the weights in 16 bits (on a CPU also in float32, which it computes in) and two layers' working
sets. A layer's working set is its weights in float32, the hidden states of all calibration tokens
before and behind it, of the original and of the rounded model, and five matrices of the size of the
second moment of its widest input in float32: of these inputs, of the original's with them, in the
order of rounding, its factor, and the difference of the first two. With MLX_OPTIQ_EXT_STREAM=1 the
bound is what is around the layers and four layers' working sets. What is kept up to a fixed size,
1 GiB in all, is not in the bound, so that small models exceed it.

A shortened model also gets the seconds of the whole one: if it was measured at two depths, from the
line through both, else from its seconds a layer, which are too many, for what is around the layers
counts in full. They are marked as extrapolated.
"""

import argparse
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

TINY = Path(__file__).parents[2] / "data" / "tiny-qwen3"
QWEN3 = {
    "model_type": "qwen3",
    "num_hidden_layers": 28,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
#: The dimensions that the models' publishers give in their config.json.
SHAPES: dict[str, dict[str, Any]] = {
    "toy": QWEN3
    | {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "head_dim": 64}
    | {"num_hidden_layers": 12, "vocab_size": 8192},
    "qwen3-0.6b": QWEN3
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16},
    "qwen3-4b": QWEN3
    | {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32}
    | {"num_hidden_layers": 36},
    "qwen3-8b": QWEN3
    | {
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": QWEN3
    | {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "gemma3-270m": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 18,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "max_position_embeddings": 32768,
        "vocab_size": 262144,
        "tie_word_embeddings": True,
    },
}
#: Layers whose output is added to the hidden state.
ADDED = ("o_proj", "down_proj")
#: What a line of the conversion's output says of the phase that begins with it.
PHASES = {"measure": "] Measuring", "refine": "Refining:", "write": "] Planned in"}


def configuration(name: str, layers: int | None) -> dict[str, Any]:
    """The config.json of a model, shortened if so many layers are given."""
    config = {**SHAPES[name], "dtype": "bfloat16"}
    return config if layers is None else {**config, "num_hidden_layers": layers}


def parameters(config: dict[str, Any]) -> dict[str, mx.array]:
    """A model's parameters by path, not evaluated."""
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    found: Any = tree_flatten(module.Model(module.ModelArgs.from_dict(config)).parameters())
    tied = config.get("tie_word_embeddings", False)
    return {path: array for path, array in found if not (tied and path == "lm_head.weight")}


def write(out: Path, config: dict[str, Any], tokenizer: Path, seed: int = 0) -> None:
    """Write a model of random weights, a file for each layer."""
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, out / name)
    every = parameters(config)
    layers: dict[str, list[str]] = {}
    for path in every:
        found = re.search(r"layers\.(\d+)\.", path)
        layers.setdefault(found[1] if found else "rest", []).append(path)
    depth = 2 * config["num_hidden_layers"]
    keys = iter(mx.random.split(mx.random.key(seed), len(every)))
    for layer, paths in layers.items():
        tensors = {}
        for path in paths:
            value, key = every.pop(path), next(keys)
            if value.ndim > 1:
                scale = 1 / math.sqrt(value.shape[-1])
                scale *= 1 / math.sqrt(depth) if any(name in path for name in ADDED) else 1
                value = scale * mx.random.normal(value.shape, dtype=mx.bfloat16, key=key)
            tensors[path] = value.astype(mx.bfloat16)
        mx.save_safetensors(str(out / f"model-{layer}.safetensors"), tensors)


def words(path: Path, tokenizer: Path, tokens: int, seed: int = 0) -> None:
    """Write a text of random words of a tokenizer, of at least so many tokens."""
    known = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    plain = [word.lstrip("Ġ▁") for word in known]
    plain = sorted({word for word in plain if word.isascii() and word.isalpha()})
    chosen = np.random.default_rng(seed).choice(plain, tokens)
    path.write_text("\n".join(" ".join(chosen[i : i + 64]) for i in range(0, tokens, 64)))


def working_set(config: dict[str, Any], tokens: int) -> int:
    """Bytes of a layer's working set, as the docstring of this script defines it."""
    every = parameters({**config, "num_hidden_layers": 1})
    own = [value for path, value in every.items() if ".layers.0." in path]
    weights = 4 * sum(value.size for value in own)
    widest = max(value.shape[-1] for value in own if value.ndim > 1)
    hidden = 2 * 2 * tokens * config["hidden_size"] * (4 if on_cpu() else 2)
    return weights + hidden + 5 * 4 * widest**2


def bound_bytes(config: dict[str, Any], tokens: int) -> int:
    """Bytes of a conversion at most, as the docstring of this script defines them."""
    each = 6 if on_cpu() else 2
    every = parameters(config)
    if os.environ.get("MLX_OPTIQ_EXT_STREAM") == "1":
        around = sum(value.size for path, value in every.items() if ".layers." not in path)
        return each * around + 4 * working_set(config, tokens)
    return each * sum(value.size for value in every.values()) + 2 * working_set(config, tokens)


def on_cpu() -> bool:
    """Whether MLX computes on the CPU."""
    return mx.default_device() == mx.Device(mx.cpu)


def convert(model: Path, out: Path, text: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds by phase, and the peaks of MLX's allocator in bytes."""
    command = [sys.executable, "-u", __file__, "--child", str(args.sequences), str(args.length)]
    command += ["--hf-path", str(model), "--mlx-path", str(out), "--optiq-calibration", str(text)]
    command += ["--optiq-budget", str(args.budget), "--optiq-effort", args.effort]
    begun, output, started = {"load": 0.0}, "", time.perf_counter()
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "MLX_OPTIQ_EXT_CACHE": str(out.parent / f"cache-{out.name}")},
    )
    assert child.stdout is not None
    while chunk := os.read(child.stdout.fileno(), 1 << 16):
        output += chunk.decode(errors="replace")
        now = time.perf_counter() - started
        begun |= {p: now for p, mark in PHASES.items() if p not in begun and mark in output}
    seconds = time.perf_counter() - started
    if child.wait():
        raise SystemExit(f"{' '.join(command)}\n{output}")
    ends = [*list(begun.values())[1:], seconds]
    phases = {p: round(end - begun[p], 2) for p, end in zip(begun, ends, strict=True)}
    peaks = json.loads(output.rpartition("PEAKS ")[2].partition("\n")[0])
    return {"seconds": phases, "total": round(seconds, 2), **peaks}


def child(arguments: list[str]) -> None:
    """Run ``mlx_lm.convert`` on so many sequences, and print the peaks of MLX's allocator."""
    from mlx_lm.convert import main

    from mlx_optiq_ext import weights
    from mlx_optiq_ext.planning import Sampling

    (count, length, *rest), prepared, found = arguments, weights.prepare, {}

    def prepare(path: str, request: weights.Request, **source: Any) -> weights.Conversion:
        sampling = Sampling(int(length), min(16, int(count)), refining=int(count))
        conversion = prepared(path, replace(request, sampling=sampling), **source)
        found["peak_bytes"] = mx.get_peak_memory()
        mx.reset_peak_memory()
        return conversion

    weights.prepare = prepare
    sys.argv = ["mlx_lm.convert", *rest]
    main()
    print("\nPEAKS " + json.dumps({**found, "writing_bytes": mx.get_peak_memory()}))


def extrapolated(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows, those of shortened models with the seconds that the whole one would take."""
    for row in rows:
        whole = SHAPES[row["model"]]["num_hidden_layers"]
        others = [r for r in rows if r["model"] == row["model"] and r["layers"] != row["layers"]]
        if row["layers"] == whole:
            yield row
            continue
        each = row["seconds_a_layer"]
        if others:
            each = (row["total"] - others[0]["total"]) / (row["layers"] - others[0]["layers"])
        total = row["total"] + each * (whole - row["layers"])
        how = "two depths" if others else "seconds a layer, too many"
        count = sum(a.size for a in parameters(configuration(row["model"], None)).values())
        estimate = {"total": round(total, 1), "seconds_a_parameter": total / count, "from": how}
        yield {**row, "extrapolated": estimate}


def main() -> None:
    """Generate, convert and print."""
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["qwen3-0.6b"])
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--budget", type=float, default=4.5)
    parser.add_argument("--effort", default="refine")
    parser.add_argument("--tokenizer", type=Path, default=TINY)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in args.models:
        name, _, layers = model.partition(":")
        config = configuration(name, int(layers) if layers else None)
        with tempfile.TemporaryDirectory() as folder:
            source, text = Path(folder) / "model", Path(folder) / "text.txt"
            write(source, config, args.tokenizer)
            words(text, args.tokenizer, args.sequences * args.length)
            found = convert(source, Path(folder) / "out", text, args)
        count = sum(array.size for array in parameters(config).values())
        depth, work = config["num_hidden_layers"], found["seconds"]
        busy = sum(work.get(phase, 0.0) for phase in ("measure", "refine"))
        bound = bound_bytes(config, args.sequences * args.length)
        row = {
            "model": name,
            "layers": depth,
            "parameters": count,
            **found,
            "seconds_a_layer": round(busy / depth, 3),
            "seconds_a_parameter": found["total"] / count,
            "bound_bytes": bound,
            "held": max(found["peak_bytes"], found["writing_bytes"]) <= bound,
        }
        rows.append(row)
        found = list(extrapolated(rows))
        print(json.dumps(found[-1]), flush=True)
        if args.report is not None:
            args.report.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
