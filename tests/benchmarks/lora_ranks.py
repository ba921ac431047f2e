"""LoRA ranks and starts beside each other: loss and accuracy at equal trainable parameters.

    python tests/benchmarks/lora_ranks.py ORIGINAL QUANTIZED [--seeds 3] [--iters 100] [--json OUT]

Fine-tunes a quantized model on arithmetic in a notation of its own, generated here, with stock
mlx-lm's training loop. Every seed draws its own training problems and starts; all methods of a seed
see the same. Accuracy is the share of held-back problems whose greedy answer is right to the last
character. The frozen weights are dequantized to float32 first, which computes the same faster on a
CPU.
"""

import argparse
import json
import math
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import numpy as np
from mlx_lm.tuner import trainer
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_optiq_ext import lora
from mlx_optiq_ext.lora.layers import adapted_layers, base_of
from mlx_optiq_ext.lora.residual import dequantized

METHODS = {
    "constant": ("constant", False),
    "by_bits": ("by_bits", False),
    "by_kl": ("by_kl", False),
    "residual": ("constant", True),
    "by_bits + residual": ("by_bits", True),
    "by_kl + residual": ("by_kl", True),
}


def problems(count: int, seed: int) -> list[tuple[str, str]]:
    """Prompts and answers, such as ``[12 x 4 + 9]`` and `` = 48 + 9 = 57``."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        a, b, c = draw.randint(2, 30), draw.randint(2, 9), draw.randint(1, 99)
        found.append((f"[{a} x {b} + {c}]", f" = {a * b} + {c} = {a * b + c}\n"))
    return found


def rows(tokenizer, pairs: list[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Tokens and where the answer starts."""
    result = []
    for prompt, answer in pairs:
        start = tokenizer.encode(prompt)
        result.append((start + tokenizer.encode(answer, add_special_tokens=False), len(start)))
    return result


def in_float32(model: Any) -> Any:
    """Replace quantized layers under LoRA, and all others, by what they compute with."""
    changed = []
    for path, module in model.named_modules():
        if "scales" not in module or path.endswith(".linear"):
            continue
        weight = dequantized(module)
        plain: Any = (nn.Embedding if isinstance(module, nn.QuantizedEmbedding) else nn.Linear)(
            1, 1
        )
        plain.weight = weight
        plain.pop("bias", None)
        changed.append((path, plain))
    for layer in adapted_layers(model).values():
        if "scales" in base_of(layer):
            plain = nn.Linear(1, 1, bias=False)
            plain.weight = dequantized(layer.linear)
            layer.linear = plain.freeze()
    from mlx.utils import tree_unflatten

    model.update_modules(tree_unflatten(changed))
    model.set_dtype(mx.float32)
    for _, module in changed:
        module.freeze()
    return model


def accuracy(model, data: list[tuple[list[int], int]]) -> float:
    """Share whose greedy answer is right: every token of it is the most likely one."""
    right = 0
    for tokens, start in data:
        best = mx.argmax(model(mx.array([tokens[:-1]]))[0], axis=-1)
        right += bool((best[start - 1 :] == mx.array(tokens[start:])).all().item())
    return right / len(data)


def one(options: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """Train and judge one method with one seed."""
    scaling, residual = METHODS[method]
    model, tokenizer = mlx_lm.load(options.quantized)[:2]
    train = rows(tokenizer, problems(options.examples, 1000 + seed))
    valid = rows(tokenizer, problems(100, 1))
    mx.random.seed(seed)
    np.random.seed(seed)  # the order of batches, in mlx-lm's loop
    model.freeze()
    config = {"rank": options.rank, "scale": options.scale, "dropout": 0.0}
    linear_to_lora_layers(model, -1, config)
    with tempfile.TemporaryDirectory() as folder:
        request = lora.Request(
            options.quantized,
            Path(folder) / "adapter",
            scaling=scaling,
            original=(lambda: mlx_lm.load(options.original, lazy=True)[0]) if residual else None,
            samples=lambda: [tokens for tokens, _ in train[:64]],
        )
        checkpoint = lora.prepare(model, config, request)
        in_float32(model)
        arguments = trainer.TrainingArgs(
            batch_size=options.batch,
            iters=options.iters,
            steps_per_report=options.iters,
            steps_per_eval=10**9,
            steps_per_save=10**9,
            max_seq_length=64,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
        )
        before = trainer.evaluate(model, valid, options.batch, -1, 64)
        compiled, mx.compile = mx.compile, lambda function, *args, **kwargs: function
        try:
            optimizer = optim.Adam(learning_rate=options.learning_rate)
            # 0.30.4 takes no training without validation data; it looks at one batch.
            arguments.val_batches = 1
            trainer.train(model, optimizer, train, valid, arguments)
        finally:
            mx.compile = compiled
    model.eval()
    return {
        "method": method,
        "seed": seed,
        "parameters": checkpoint.notes["parameters"],
        "ranks": sorted(set(checkpoint.ranks.values())),
        "loss_at_start": before,
        "loss": trainer.evaluate(model, valid, options.batch, -1, 64),
        "accuracy": accuracy(model, valid),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Mean and standard error over seeds, one line a method."""
    lines = [
        "| method | parameters | loss at start | validation loss | accuracy |",
        "|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(row["method"] for row in results):
        found = [row for row in results if row["method"] == method]
        cells = [spread([row[key] for row in found]) for key in ("loss_at_start", "loss")]
        right = spread([100 * row["accuracy"] for row in found], 1)
        lines.append(f"| {method} | {found[0]['parameters']:,} | {' | '.join(cells)} | {right} % |")
    return "\n".join(lines)


def spread(values: list[float], digits: int = 4) -> str:
    """Mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("original")
    parser.add_argument("quantized")
    parser.add_argument("--methods", default=",".join(list(METHODS)[:4]))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iters", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--examples", type=int, default=600)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--scale", type=float, default=4.0)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    for seed in range(options.seeds):
        for method in options.methods.split(","):
            results.append(one(options, method, seed))
            print(json.dumps(results[-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=2))
    print(table(results))


if __name__ == "__main__":
    main()
