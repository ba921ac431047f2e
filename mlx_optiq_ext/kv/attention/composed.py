"""Decoding as two of MLX's quantized matrix products, which read packed data as it is."""

import mlx.core as mx

from ..formats import Multiplying
from ..kept.recent import outputs_with
from ..packed_array import Packed
from .scores import grouped, mended, probabilities, rows_of


def supports(*sides: Packed | mx.array) -> bool:
    """Whether MLX has a product with data in these forms."""
    packed = (side for side in sides if isinstance(side, Packed))
    return all(isinstance(side.format, Multiplying) for side in packed)


def attend(
    queries: mx.array,
    keys: Packed | mx.array,
    values: Packed | mx.array,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    """Attention in the stored basis; see `mlx_optiq_ext.kv.attend`.

    The scores of all queries are in memory at once, so this is for few queries.
    """
    batch, query_heads, length, _ = queries.shape
    heads, tokens = keys.shape[1:3]
    scores = product(grouped(queries * scale, heads), keys, transpose=True)
    scores = mended(scores, queries * scale, keys)
    weights = probabilities(scores, rows_of(mask, 0, length, length, tokens), sinks)
    recent = values.recent if isinstance(values, Packed) else None
    output = outputs_with(lambda own: product(own, values, transpose=False), weights, recent, 0)
    return output.reshape(batch, query_heads, length, output.shape[-1])


def product(left: mx.array, right: Packed | mx.array, *, transpose: bool) -> mx.array:
    """``left @ right``, or with its transpose, over (batch, heads, repeats, ...)."""
    if not isinstance(right, Packed):
        right = mx.expand_dims(right, 2)
        return left @ (right.swapaxes(-1, -2) if transpose else right)
    assert isinstance(right.format, Multiplying), "`supports` was not asked"
    parts = [mx.expand_dims(part, 2) for part in right.parts]
    return right.format.multiply(left, parts, transpose=transpose)
