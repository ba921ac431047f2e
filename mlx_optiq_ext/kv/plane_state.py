"""The state of one of a packed cache's planes, in a form that every mlx-lm and MLX can save."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx

from .. import files
from ..errors import InputError

_AGAIN = "save the prompt cache again"


def storable(state: Any) -> Any:
    """A plane's state with placeholders for arrays of zero width, which old MLX cannot save."""
    if not isinstance(state, list | tuple):
        return state
    return [mx.zeros((1,), a.dtype) if _is_rows(a) and a.shape[-1] == 0 else a for a in state]


def restored(state: Any, first: Any) -> Any:
    """Undo `storable`; the shapes are taken from the first plane, whose arrays have widths."""
    if not isinstance(state, list | tuple):
        return state
    if any(isinstance(part, dict) for part in state):  # MLX fills gaps in a list with these
        raise InputError(f"a packed layer lacks arrays: {_AGAIN}")
    return [
        mx.zeros((*like.shape[:3], 0), a.dtype) if _is_rows(like) and a.ndim == 1 else a
        for a, like in zip(state, first, strict=True)
    ]


def check_rows(planes: Sequence[Any], rows: Iterable[tuple[mx.array, mx.array]] | None) -> None:
    """Refuse planes that do not hold what a layer's formats write.

    Args:
        planes: A packed cache's, in order.
        rows: What one position takes in each, see `encoding.rows_of`; None where nothing was held.

    Raises:
        InputError: An array is missing, or has another shape or dtype; the message says which.
    """
    if rows is None:
        if any(array is not None for plane in planes for array in (plane.keys, plane.values)):
            raise InputError(f"a packed layer does not say its dims: {_AGAIN}")
        return
    first = planes[0].keys, planes[0].values
    offsets = {plane.offset for plane in planes if isinstance(plane.offset, int)}
    for plane, row in zip(planes, rows, strict=True):
        for side, array, one, like in zip(
            ("keys", "values"), (plane.keys, plane.values), row, first, strict=True
        ):
            if not _is_rows(array) or not _is_rows(first[0]) or not _is_rows(like):
                raise InputError(f"a packed layer lacks {side}: {_AGAIN}")
            wanted = (first[0].shape[0], like.shape[1], first[0].shape[2], one.shape[-1])
            if array.shape != wanted or array.dtype != one.dtype:
                raise InputError(
                    f"the {side} of a packed layer are {array.dtype} {array.shape} where its "
                    f"format has {one.dtype} {wanted}: {_AGAIN}"
                )
    length = first[0].shape[2] if type(planes[0]).__name__ == "KVCache" else math.inf
    if len(offsets) > 1 or any(not 0 <= offset <= length for offset in offsets):
        raise InputError(f"a packed layer ends at {files.shown(max(offsets))}: {_AGAIN}")


def _is_rows(array: Any) -> bool:
    return isinstance(array, mx.array) and array.ndim == 4
