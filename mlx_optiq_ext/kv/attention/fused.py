"""Attention with MLX's fused kernel, on one layer's keys and values unpacked for it."""

import mlx.core as mx

from ..packed_array import Packed


def attend(
    queries: mx.array,
    keys: Packed | mx.array,
    values: Packed | mx.array,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    """Attention in the stored basis; see `mlx_optiq_ext.kv.attend`."""
    return mx.fast.scaled_dot_product_attention(
        queries,
        _stored(keys, queries.dtype),
        _stored(values, queries.dtype),
        scale=scale,
        mask=mask,
        sinks=sinks,
    )


def _stored(array: Packed | mx.array, dtype: mx.Dtype) -> mx.array:
    return array.stored(dtype) if isinstance(array, Packed) else array
