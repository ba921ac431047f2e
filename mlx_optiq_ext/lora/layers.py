"""mlx-lm's own LoRA layers on a model."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..errors import UnsupportedError
from .adapter import Adapter
from .fitting import fit
from .geometry import EMBEDDING, EXPERTS, geometry


def attach(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Put an adapter on a model as mlx-lm's own LoRA or DoRA layers, each with its own rank.

    Its arrays become float32, like those that mlx-lm trains.

    Args:
        model: A model without LoRA layers; changed.
        adapter: An adapter of any form.

    Returns:
        The model.

    Raises:
        InputError: The adapter is for another model.
        UnsupportedError: mlx-lm has no such layer: DoRA on experts.
    """
    modules = dict(model.named_modules())
    changed = []
    for path, layer in fit(adapter, model).layers.items():
        made = _adapted(modules[path], layer.rank, layer.scale, dora=layer.magnitude is not None)
        # Like PEFT, so that fusing does not round the update twice.
        made.lora_a, made.lora_b = layer.a.astype(mx.float32), layer.b.astype(mx.float32)
        if layer.magnitude is not None:
            made.m = layer.magnitude.astype(mx.float32)
        changed.append((path, made))
    model.update_modules(tree_unflatten(changed))
    return model


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Path -> LoRA or DoRA layer, in the model's order.

    Raises:
        UnsupportedError: The model brings LoRA layers of its own, whose ranks are tied together.
    """
    found = {}
    for path, module in model.named_modules():
        if "lora_a" not in module:
            continue
        if base_of(module) is None or not isinstance(module["lora_a"], mx.array):
            raise UnsupportedError(
                f"{path} brings LoRA layers of its own ({type(module).__name__}), which only stock "
                "mlx-lm trains: leave the --optiq-* options out"
            )
        found[path] = module
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def base_of(module: Any) -> Any:
    """The layer under a LoRA layer; None if there is none."""
    return module.get("linear", module.get("embedding"))


def with_rank(module: Any, rank: int, dropout: float) -> Any:
    """A new LoRA layer like this one, with another rank."""
    made = type(module).from_base(base_of(module), r=rank, scale=module.scale, dropout=dropout)
    # mlx-lm's DoRA counts the inputs of 3-, 5- and 6-bit layers wrongly.
    shape = geometry(base_of(module))
    assert shape is not None
    if made.lora_a.shape != shape.shapes(rank)[0]:
        bound = shape.inputs**-0.5
        made.lora_a = mx.random.uniform(-bound, bound, shape.shapes(rank)[0])
    return made


def _adapted(base: Any, rank: int, scale: float, *, dora: bool) -> Any:
    from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
    from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

    shape = geometry(base)
    assert shape is not None
    if dora and shape.kind == EXPERTS:
        raise UnsupportedError("mlx-lm has no DoRA for stacked experts: train the adapter as LoRA")
    if shape.kind == EXPERTS:
        kind: Any = LoRASwitchLinear
    elif shape.kind == EMBEDDING:
        kind = DoRAEmbedding if dora else LoRAEmbedding
    else:
        kind = DoRALinear if dora else LoRALinear
    return kind.from_base(base, r=rank, scale=scale, dropout=0.0)


def _natural(path: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
