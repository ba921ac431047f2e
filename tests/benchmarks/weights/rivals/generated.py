"""Write a model of Qwen3's shape with random weights, shard by shard.

    python generated.py OUT --tokenizer FOLDER --hidden 512 --layers 12 [--vocabulary 8192]

Weights are drawn as an untrained model's would be, in bfloat16. The tokenizer is copied; the
embedding may have more rows than it has tokens. Prints the number of parameters.
"""

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.qwen3 import Model, ModelArgs


def configuration(hidden: int, layers: int, vocabulary: int) -> dict:
    """A config.json: heads of 64, a feed-forward three times as wide, a tied head."""
    heads = hidden // 64
    return {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 4, 1),
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rope_theta": 1e5,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def write(out: Path, tokenizer: Path, hidden: int, layers: int, vocabulary: int) -> int:
    """Write the model; returns its parameters."""
    out.mkdir(parents=True)
    config = configuration(hidden, layers, vocabulary)
    (out / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, out / name)
    model: nn.Module = Model(ModelArgs.from_dict(config))
    shards: dict[str, dict[str, mx.array]] = {}
    total = 0
    parameters: Any = tree_flatten(model.parameters())
    for path, value in parameters:
        parts = path.split(".")
        shard = parts[2] if "layers" in parts else "rest"
        # As PyTorch and MLX initialize: uniform, with a variance of a third over the inputs.
        bound = 1 / math.sqrt(value.shape[-1])
        drawn = mx.random.uniform(-bound, bound, value.shape) if value.ndim == 2 else value
        shards.setdefault(shard, {})[path] = drawn.astype(mx.bfloat16)
        total += value.size
    for name, tensors in shards.items():
        mx.save_safetensors(str(out / f"model-{name}.safetensors"), tensors)
    return total


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--vocabulary", type=int, default=8192)
    args = parser.parse_args()
    mx.random.seed(0)
    print(write(args.out, args.tokenizer, args.hidden, args.layers, args.vocabulary))


if __name__ == "__main__":
    main()
