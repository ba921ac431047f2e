"""The first keys of each sequence, kept as the model computes them.

Attention looks at the first tokens of a sequence more than at any others (attention sinks, Xiao et
al., arXiv 2309.17453), and their keys lie far from all that formats are fitted to. What rounding
takes from them is kept beside the cache and comes back into their scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..formats import Format

#: mlx-lm's caches that never lose a sequence's first tokens.
KEEPING = ("KVCache", "BatchKVCache")


@dataclass(frozen=True)
class FirstKeys:
    """What the first keys of each row differ by from what is packed.

    Attributes:
        residuals: (batch, heads, count, dim), in the stored basis; zeros where no key is yet.
        starts: Where each row begins behind padding, int32 (batch,); None for at zero.
    """

    residuals: mx.array
    starts: mx.array | None = None

    @property
    def count(self) -> int:
        """Keys of a row."""
        return self.residuals.shape[2]

    def scores(self, queries: mx.array) -> mx.array:
        """Queries (batch, query heads, length, dim) in the stored basis times the residuals.

        Returns:
            float32 (batch, query heads, length, count).
        """
        grouped = mx.unflatten(queries.astype(mx.float32), 1, (self.residuals.shape[1], -1))
        right = self.residuals.astype(mx.float32)[:, :, None].swapaxes(-1, -2)
        return (grouped @ right).flatten(1, 2)

    def added(self, array: mx.array, own: mx.array, axis: int) -> mx.array:
        """An array with something added to each row's first tokens.

        Args:
            array: (batch, ..., tokens, ...).
            own: What is added, the same but with `count` in place of tokens.
            axis: Axis of the tokens.
        """
        tokens, own = array.shape[axis], own.astype(array.dtype)
        if self.starts is None:
            parts = mx.split(array, [min(self.count, tokens)], axis=axis)
            own = mx.split(own, [min(self.count, tokens)], axis=axis)[0]
            return mx.concatenate([parts[0] + own, parts[1]], axis=axis)
        shape = [1] * array.ndim
        shape[0], shape[axis] = array.shape[0], tokens
        place = (mx.arange(tokens)[None] - self.starts[:, None]).reshape(shape)
        for number, each in enumerate(mx.split(own, self.count, axis=axis)):
            array = array + mx.where(place == number, each, mx.array(0, array.dtype))
        return array


def found(
    known: mx.array | None,
    keys: mx.array,
    parts: Sequence[mx.array],
    format: Format,
    offset: Any,
    count: int,
) -> mx.array:
    """Residuals of the first keys, with those that come with new ones.

    Args:
        known: Those found before, (batch, heads, count, dim), or None.
        keys: New keys, (batch, heads, length, dim).
        parts: The same, packed.
        format: How.
        offset: Position of the first of them: a number, or int32 (batch,) below zero for padding.
        count: First keys of a row.
    """
    length, places = keys.shape[2], mx.arange(count)[None]
    index = places - mx.array(offset).reshape(-1, 1)
    there = mx.logical_and(index >= 0, index < length)[:, None, :, None]
    index = mx.clip(index, 0, length - 1)[:, None, :, None]

    def taken(array: mx.array) -> mx.array:
        shape = (array.shape[0], array.shape[1], count, array.shape[3])
        return mx.take_along_axis(array, mx.broadcast_to(index, shape), axis=2)

    exact = format.turn(taken(keys))
    residual = exact - format.unpack([taken(part) for part in parts], exact.dtype)
    return mx.where(there, residual, mx.zeros_like(residual) if known is None else known)


def joined(rows: Sequence[tuple[mx.array | None, int]]) -> mx.array | None:
    """Residuals of several caches, one behind the other; zeros for those that have none.

    Args:
        rows: Residuals and number of rows of each cache.
    """
    like = next((array for array, _ in rows if array is not None), None)
    if like is None:
        return None
    return mx.concatenate(
        [
            mx.zeros((count, *like.shape[1:]), like.dtype) if array is None else array
            for array, count in rows
        ]
    )
