"""Attention on a CPU, in blocks of queries and tiles of tokens.

MLX has no fused kernel there, and half precision is emulated: tiles are unpacked to float32, and
never more scores exist than one block of queries needs.
"""

import mlx.core as mx

from ..packed import Packed
from .scores import grouped, probabilities, rows_of

#: Queries of a block.
QUERIES = 256
#: Tokens of a tile.
TOKENS = 1024


def attend(
    queries: mx.array,
    keys: Packed | mx.array,
    values: Packed | mx.array,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    """Attention in the stored basis; see `mlx_optiq_ext.kv.attention.attention`."""
    length, (heads, tokens) = queries.shape[2], keys.shape[1:3]
    spans = [(t, min(t + TOKENS, tokens)) for t in range(0, tokens, TOKENS)]
    key_tiles = [_tile(keys, *span).swapaxes(-1, -2) for span in spans]
    value_tiles = [_tile(values, *span) for span in spans]
    outputs = []
    for start in range(0, length, QUERIES):
        stop = min(start + QUERIES, length)
        block = grouped(queries[:, :, start:stop].astype(mx.float32) * scale, heads)
        scores = _joined([block @ tile for tile in key_tiles])
        weights = probabilities(scores, rows_of(mask, start, stop, length, tokens), sinks)
        products = [
            weights[..., slice(*span)] @ tile for span, tile in zip(spans, value_tiles, strict=True)
        ]
        output = sum(products[1:], start=products[0])
        outputs.append(output.flatten(1, 2).astype(queries.dtype))
        if length > QUERIES:
            mx.eval(outputs)  # else MLX sets memory aside for many blocks before it runs the first
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def _tile(array: Packed | mx.array, start: int, stop: int) -> mx.array:
    """Tokens from start to stop as (batch, heads, 1, tokens, dim) in float32."""
    part = array[:, :, start:stop]
    part = part.stored(mx.float32) if isinstance(part, Packed) else part.astype(mx.float32)
    return mx.expand_dims(part, 2)


def _joined(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
