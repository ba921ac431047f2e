"""Adapters with random weights, as mlx-lm writes them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_optiq_ext.lora.geometry import EMBEDDING, geometry

KEYS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


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
