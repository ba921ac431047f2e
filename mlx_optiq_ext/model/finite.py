"""Refuses models with parameters or logits that are not finite, before they are measured."""

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import InputError

#: Roughly the root of float32's largest number; squares of larger values overflow.
LARGEST = 1e19


def check_arrays(arrays: Iterable[tuple[str, mx.array]]) -> None:
    """Refuse NaN, infinity and values whose squares overflow float32.

    Args:
        arrays: Names, and arrays of any shape; each is evaluated by itself.

    Raises:
        InputError: An array holds one of them; the message names it.
    """
    for name, array in arrays:
        if not _floating(array) or not array.size:
            continue
        # One pass: a comparison with NaN is false, and float16's infinity is above its maximum.
        limit = min(LARGEST, mx.finfo(array.dtype).max)
        if not mx.all(mx.abs(array) <= limit).item():
            largest = _largest(array)
            raise InputError(
                f"{name} holds {largest:g}: the checkpoint is damaged, download or save it again"
            )


def check_parameters(model: nn.Module) -> None:
    """Refuse NaN and overflow in a model's parameters; see `check_arrays`."""
    check_arrays(_parameters(model))


def check_outputs(model: nn.Module, tokens: mx.array) -> None:
    """Refuse a model whose logits are not finite although its parameters are.

    Args:
        model: An mlx-lm model.
        tokens: int32 (batch, length) to compute logits of.

    Raises:
        InputError: They are not; the message names the largest parameter.
    """
    # A model may rule tokens out with logits of minus infinity.
    sums = mx.logsumexp(model(tokens).astype(mx.float32), axis=-1)
    if mx.all(mx.isfinite(sums)).item():
        return
    sizes = [(_largest(a), name) for name, a in _parameters(model) if a.size and _floating(a)]
    largest, name = max(sizes)
    raise InputError(
        "the model's logits on the calibration text are not finite numbers; the largest of its "
        f"parameters is {largest:g}, in {name}: its weights or its config.json are damaged"
    )


def _parameters(model: nn.Module) -> list[tuple[str, mx.array]]:
    found = tree_flatten(model.parameters())
    assert isinstance(found, list)
    return found


def _largest(array: mx.array) -> float:
    """The largest magnitude; NaN if there is one, which `mx.max` may pass over."""
    magnitudes = mx.abs(array)
    largest: Any = mx.where(mx.any(mx.isnan(array)), mx.nan, magnitudes.max()).item()
    return largest


def _floating(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)
