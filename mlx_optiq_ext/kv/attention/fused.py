"""Attention with MLX's fused kernel, on one layer's keys and values unpacked for it."""

from collections.abc import Sequence

import mlx.core as mx

from ..kept.recent import Recent, replaced, taken
from ..packed_array import Packed
from .scores import rows_of


def attend(
    queries: mx.array,
    keys: Packed | mx.array,
    values: Packed | mx.array,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    """Attention in the stored basis; see `mlx_optiq_ext.kv.attend`."""
    length, tokens = queries.shape[2], keys.shape[2]
    exact = _recent(keys), _recent(values)
    sides = _stored(keys, queries.dtype), _stored(values, queries.dtype)
    if (like := exact[0] or exact[1]) is not None:
        at, sees, _ = like.near(0, length, tokens)
        sides = [_again(side, own, at) for side, own in zip(sides, exact, strict=True)]
        mask = rows_of(mask, 0, length, length, tokens)
        near = replaced(mx.zeros((length, tokens), mx.bool_), at, sees)
        own = (
            None
            if mask is None
            else taken(mx.broadcast_to(mask, (*mask.shape[:-2], *near.shape)), at)
        )
        mask = _divided(mask, near, own, sees, queries.dtype)
    return mx.fast.scaled_dot_product_attention(
        queries, sides[0], sides[1], scale=scale, mask=mask, sinks=sinks
    )


def _stored(array: Packed | mx.array, dtype: mx.Dtype) -> mx.array:
    return array.stored(dtype) if isinstance(array, Packed) else array


def _recent(array: Packed | mx.array) -> Recent | None:
    return array.recent if isinstance(array, Packed) else None


def _again(side: mx.array, recent: Recent | None, at: Sequence[slice]) -> mx.array:
    """Keys or values, and behind them those near the queries as they were computed."""
    near = taken(side, at, axis=-2)
    if recent is not None:
        near = recent.near(0, recent.length, side.shape[2])[2].astype(side.dtype)
    return mx.concatenate([side, near], axis=2)


def _divided(
    mask: mx.array | None, near: mx.array, own: mx.array | None, sees: mx.array, dtype: mx.Dtype
) -> mx.array:
    """A mask without what is near, and behind it that of what is near: no token is in both.

    Args:
        mask: What broadcasts to (..., queries, tokens), or None.
        near: Whether each query sees each token as it was computed, (queries, tokens).
        own: The mask of those that some query sees so, (..., queries, positions).
        sees: ``near`` of these alone, (queries, positions).
        dtype: Of a mask that is added.
    """
    if mask is None or own is None:
        return mx.concatenate([mx.logical_not(near), sees], axis=-1)
    if mask.dtype == mx.bool_:
        parts = mx.logical_and(mask, mx.logical_not(near)), mx.logical_and(own, sees)
    else:
        never = mx.array(mx.finfo(dtype).min, dtype)
        parts = mx.where(near, never, mask.astype(dtype)), mx.where(sees, own.astype(dtype), never)
    return mx.concatenate(list(parts), axis=-1)
