"""The state of one of a packed cache's planes, in a form that every mlx-lm and MLX can save."""

from typing import Any

import mlx.core as mx

from ..errors import InputError


def storable(state: Any) -> Any:
    """A plane's state with a number in place of arrays of no width, which old MLX cannot save."""
    if not isinstance(state, list | tuple):
        return state
    return [mx.zeros((1,), a.dtype) if _is_rows(a) and a.shape[-1] == 0 else a for a in state]


def restored(state: Any, first: Any) -> Any:
    """Undo `storable`; the first plane, which has widths, tells the shapes."""
    if not isinstance(state, list | tuple):
        return state
    if any(isinstance(part, dict) for part in state):  # what MLX fills a list with
        raise InputError("a packed layer lacks arrays: save the prompt cache again")
    return [
        mx.zeros((*like.shape[:3], 0), a.dtype) if _is_rows(like) and a.ndim == 1 else a
        for a, like in zip(state, first, strict=True)
    ]


def _is_rows(array: Any) -> bool:
    return isinstance(array, mx.array) and array.ndim == 4
