"""Attention with MLX's fused kernel, on one layer's keys and values unpacked for it."""

import mlx.core as mx

from ..packed_array import Packed
from ..recent import Recent
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
        mask = _divided(rows_of(mask, 0, length, length, tokens), sees, at, tokens, queries.dtype)
    return mx.fast.scaled_dot_product_attention(
        queries, sides[0], sides[1], scale=scale, mask=mask, sinks=sinks
    )


def _stored(array: Packed | mx.array, dtype: mx.Dtype) -> mx.array:
    return array.stored(dtype) if isinstance(array, Packed) else array


def _recent(array: Packed | mx.array) -> Recent | None:
    return array.recent if isinstance(array, Packed) else None


def _again(side: mx.array, recent: Recent | None, at: slice) -> mx.array:
    """Keys or values, and behind them those near the queries as they were computed."""
    near = side[:, :, at]
    if recent is not None:
        near = recent.near(0, recent.length, side.shape[2])[2].astype(side.dtype)
    return mx.concatenate([side, near], axis=2)


def _divided(
    mask: mx.array | None, sees: mx.array, at: slice, tokens: int, dtype: mx.Dtype
) -> mx.array:
    """A mask (..., queries, tokens), and behind it that of what is near; no token is in both."""
    near = mx.pad(sees, [(0, 0), (at.start, tokens - at.stop)])
    if mask is None:
        return mx.concatenate([mx.logical_not(near), sees], axis=-1)
    mask = mx.broadcast_to(mask, (*mask.shape[:-2], *near.shape))
    if mask.dtype == mx.bool_:
        parts = mx.logical_and(mask, mx.logical_not(near)), mx.logical_and(mask[..., at], sees)
    else:
        never, mask = mx.array(-mx.inf, dtype), mask.astype(dtype)
        parts = mx.where(near, never, mask), mx.where(sees, mask[..., at], never)
    return mx.concatenate(list(parts), axis=-1)
