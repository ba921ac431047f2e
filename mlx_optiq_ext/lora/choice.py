"""Gives mlx-lm's LoRA layers ranks that a plugin chooses."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import mlx.nn as nn
from mlx.utils import tree_unflatten

from .layers import base_of, with_rank

#: ``(path, base layer, rank)`` to another rank, or None to keep it.
Choose: TypeAlias = Callable[[str, nn.Module, int], int | None]


def choose_ranks(model: nn.Module, parameters: Mapping[str, Any], choose: Choose) -> None:
    """Give each LoRA layer of a model the rank that is chosen for it.

    Args:
        model: A model with mlx-lm's untrained LoRA layers; changed.
        parameters: mlx-lm's ``lora_parameters``, which the layers were made with.
        choose: Called for each of them in the model's order.
    """
    rank, changed = parameters["rank"], []
    for path, layer in model.named_modules():
        # LoRA layers of the architecture itself have no base layer, and ranks that depend on each
        # other.
        base = base_of(layer) if "lora_a" in layer else None
        if base is None:
            continue
        chosen = choose(path, base, rank)
        if chosen is not None and chosen != rank:
            changed.append((path, with_rank(layer, chosen, parameters["dropout"])))
    if changed:
        model.update_modules(tree_unflatten(changed))
