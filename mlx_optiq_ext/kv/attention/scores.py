"""Masks and softmax over scores of shape (batch, heads, repeats, length, tokens)."""

import mlx.core as mx

from ..kept.recent import scores_with
from ..packed_array import Packed


def grouped(queries: mx.array, heads: int) -> mx.array:
    """(batch, query heads, length, dim) as (batch, heads, repeats, length, dim)."""
    batch, query_heads, length, dim = queries.shape
    return queries.reshape(batch, heads, query_heads // heads, length, dim)


def rows_of(mask: mx.array | str | None, start: int, stop: int, length: int, tokens: int):
    """The mask of the queries from ``start`` to ``stop`` of ``length``, as an array or None."""
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f"mask {mask!r} is neither 'causal' nor an array")
        rows = mx.arange(tokens - length + start, tokens - length + stop)
        return rows[:, None] >= mx.arange(tokens)[None]
    if mask is None or mask.ndim < 2 or mask.shape[-2] == 1:
        return mask
    return mask[..., start:stop, :]


def probabilities(
    scores: mx.array, mask: mx.array | None, sinks: mx.array | None = None
) -> mx.array:
    """Softmax over tokens.

    Args:
        scores: (batch, heads, repeats, length, tokens).
        mask: What broadcasts to (batch, heads x repeats, length, tokens), or None.
        sinks: (heads x repeats,) or None.
    """
    heads, repeats = scores.shape[1:3]
    if mask is not None:
        if mask.ndim == 4:
            one = mask.shape[1] == 1
            mask = mx.expand_dims(mask, 2) if one else mx.unflatten(mask, 1, (heads, repeats))
        elif mask.ndim == 3:
            mask = mx.unflatten(mask, 0, (heads, repeats)) if mask.shape[0] > 1 else mask
        if mask.dtype == mx.bool_:
            scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
        else:
            scores = scores + mask.astype(scores.dtype)
    if sinks is None:
        return mx.softmax(scores, axis=-1, precise=True)
    column = sinks.astype(scores.dtype).reshape(1, heads, repeats, 1, 1)
    column = mx.broadcast_to(column, (*scores.shape[:-1], 1))
    return mx.softmax(mx.concatenate([column, scores], axis=-1), axis=-1, precise=True)[..., 1:]


def mended(
    scores: mx.array, queries: mx.array, keys: Packed | mx.array, start: int = 0
) -> mx.array:
    """Scores in which the first and the last keys are as they were computed.

    Args:
        scores: (batch, heads, repeats, length, tokens).
        queries: (batch, query heads, length, dim), scaled, in the stored basis.
        keys: Those that the scores are of.
        start: Number of the first query among the new tokens.
    """
    if not isinstance(keys, Packed):
        return scores
    if keys.first is not None:
        own = mx.unflatten(keys.first.scores(queries), 1, scores.shape[1:3])
        scores = keys.first.added(scores, own, 4)
    return scores_with(scores, queries, keys.recent, start)
