"""Ranks that somebody else chooses, for LoRA layers that mlx-lm made."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import mlx.nn as nn
from mlx.utils import tree_unflatten

from .layers import base_of, with_rank

#: ``(path, base layer, rank)`` to another rank, or None for that one.
Choose: TypeAlias = Callable[[str, nn.Module, int], int | None]


def choose_ranks(model: nn.Module, parameters: Mapping[str, Any], choose: Choose) -> None:
    """Give each LoRA layer of a model the rank that is chosen for it.

    Args:
        model: With mlx-lm's LoRA layers, not trained yet. It is changed.
        parameters: mlx-lm's ``lora_parameters``, which the layers were made with.
        choose: Called for each of them in the model's order.
    """
    rank, changed = parameters["rank"], []
    for path, layer in model.named_modules():
        # A model's own LoRA layers have no base, and ranks that belong together.
        base = base_of(layer) if "lora_a" in layer else None
        if base is None:
            continue
        chosen = choose(path, base, rank)
        if chosen is not None and chosen != rank:
            changed.append((path, with_rank(layer, chosen, parameters["dropout"])))
    if changed:
        model.update_modules(tree_unflatten(changed))
