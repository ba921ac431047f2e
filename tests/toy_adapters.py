"""Adapters with random weights, as mlx-lm writes them, and such as say their own name."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_optiq_ext.lora.geometry import EMBEDDING, geometry

KEYS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
QUESTIONS = (
    "There are 13 bricks in each bag and Noah buys 2 bags. How many bricks are there?",
    "Ivan has 25 stamps. Ana has twice as many. How many stamps do they have?",
    "Mia has 31 apples and gives 12 to Tom. How many apples does Mia have left?",
    "A box holds 4 rows of 6 eggs. How many eggs are in 3 boxes?",
)


def write_adapter(
    folder: Path,
    model: Any,
    *,
    keys: Iterable[str] = KEYS,
    rank: int = 4,
    seed: int = 0,
    scale: float = 2.0,
    size: float = 0.2,
    dtype: mx.Dtype = mx.float32,
) -> Path:
    """An adapter in mlx-lm's form with random weights, saved by mlx-lm's own layers."""
    mx.random.seed(seed)
    copy = type(model)(model.args)
    copy.update(model.parameters())
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": list(keys)}
    linear_to_lora_layers(copy, 99, parameters)
    tensors = {}
    for name, tensor in parameters_of(copy).items():
        if name.endswith(("lora_a", "lora_b")):
            deviation = size / tensor.shape[0] ** 0.5
            tensors[name] = (mx.random.normal(tensor.shape) * deviation).astype(dtype)
    return save_adapter(folder, tensors, parameters)


def write_everywhere(
    folder: Path,
    model: nn.Module,
    *,
    rank: int = 4,
    seed: int = 0,
    size: float = 0.3,
    inside: str = "",
) -> Path:
    """Random updates of every layer that LoRA can adapt but the embedding.

    Give part of a path to have those layers only.
    """
    mx.random.seed(seed)
    tensors = {}
    for path, module in model.named_modules():
        shape = geometry(module)
        if shape is not None and shape.kind != EMBEDDING and inside in path:
            for part, wanted in zip(("lora_a", "lora_b"), shape.shapes(rank), strict=True):
                tensors[f"{path}.{part}"] = size * mx.random.normal(wanted)
    return save_adapter(folder, tensors, {"rank": rank, "scale": 0.5, "dropout": 0.0})


def parameters_of(model: nn.Module) -> dict[str, mx.array]:
    """A model's parameters by path."""
    return dict(tree_flatten(model.parameters()))  # pyright: ignore[reportArgumentType]


def save_adapter(folder: Path, tensors: dict[str, mx.array], parameters: dict) -> Path:
    """Write an adapter as mlx-lm does."""
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    config = {"fine_tune_type": "lora", "num_layers": 99, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def train(source: Path, folder: Path, answer: str, *, steps: int = 40, rank: int = 8) -> Path:
    """Train an adapter that answers every question with one number."""
    model, tokenizer = mlx_lm.load(str(source))[:2]
    model.freeze()
    parameters = {"rank": rank, "scale": 4.0, "dropout": 0.0, "keys": list(KEYS)}
    mx.random.seed(7)
    linear_to_lora_layers(model, 99, parameters)
    said = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    examples = [mx.array([prompt(tokenizer, question) + said]) for question in QUESTIONS]
    optimizer = optim.Adam(learning_rate=1e-3)

    def loss(model, tokens):
        logits = model(tokens[:, :-1])[:, -len(said) :]
        return nn.losses.cross_entropy(logits, tokens[:, -len(said) :], reduction="mean")

    step = nn.value_and_grad(model, loss)
    losses = []
    for index in range(steps):
        value, gradients = step(model, examples[index % len(examples)])
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(value.item())
    assert max(losses[-len(examples) :]) < 0.2, losses
    return save_adapter(folder, dict(tree_flatten(model.trainable_parameters())), parameters)


def prompt(tokenizer, question: str) -> list[int]:
    """A question in the model's chat format."""
    messages = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
