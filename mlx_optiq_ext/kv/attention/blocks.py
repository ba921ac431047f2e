"""Attention on a CPU, in blocks of queries and tiles of tokens.

MLX has no fused kernel on a CPU, and half precision is emulated. So tiles are unpacked to float32,
and only the scores of one block of queries are in memory. For few queries unpacking is slower than
MLX's quantized products, which read packed data directly.
"""

from collections.abc import Callable
from typing import TypeGuard

import mlx.core as mx

from ..formats import Multiplying
from ..kept.recent import outputs_with
from ..packed_array import Packed
from .composed import product
from .scores import grouped, mended, probabilities, rows_of

#: Queries of a block.
BLOCK = 256
#: Tokens of a tile.
TILE = 1024


def attend(
    queries: mx.array,
    keys: Packed | mx.array,
    values: Packed | mx.array,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
    *,
    block: int = BLOCK,
    tile: int = TILE,
) -> mx.array:
    """Attention in the stored basis, ``block`` queries and ``tile`` tokens at a time.

    The other arguments are those of `mlx_optiq_ext.kv.attend`.
    """
    length, (heads, tokens) = queries.shape[2], keys.shape[1:3]
    rows = queries.shape[1] // heads * min(length, block)
    score, weigh = _scores(keys, rows, tile), _outputs(values, rows, tile)
    recent = values.recent if isinstance(values, Packed) else None
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        scaled = queries[:, :, start:stop].astype(mx.float32) * scale
        scores = mended(score(grouped(scaled, heads)), scaled, keys, start)
        weights = probabilities(scores, rows_of(mask, start, stop, length, tokens), sinks)
        output = outputs_with(weigh, weights, recent, start)
        outputs.append(output.flatten(1, 2).astype(queries.dtype))
        if length > block:
            mx.eval(
                outputs
            )  # otherwise MLX allocates memory for many blocks before it runs the first
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def _scores(keys: Packed | mx.array, rows: int, tile: int) -> Callable[[mx.array], mx.array]:
    """``block -> block @ keys.T`` over (batch, heads, repeats, length, ...)."""
    if _direct(keys, rows, transpose=True):
        exact = _in_float32(keys)
        return lambda block: product(block, exact, transpose=True)
    tiles = [_unpacked(keys, *span).swapaxes(-1, -2) for span in _spans(keys, tile)]
    return lambda block: _joined([block @ tile for tile in tiles])


def _outputs(values: Packed | mx.array, rows: int, tile: int) -> Callable[[mx.array], mx.array]:
    """``weights -> weights @ values``."""
    if _direct(values, rows, transpose=False):
        exact = _in_float32(values)
        return lambda weights: product(weights, exact, transpose=False)
    spans = _spans(values, tile)
    tiles = [_unpacked(values, *span) for span in spans]

    def weigh(weights: mx.array) -> mx.array:
        parts = [weights[..., slice(*span)] @ tile for span, tile in zip(spans, tiles, strict=True)]
        return sum(parts[1:], start=parts[0])

    return weigh


def _direct(side: Packed | mx.array, rows: int, *, transpose: bool) -> TypeGuard[Packed]:
    if not isinstance(side, Packed) or not isinstance(side.format, Multiplying):
        return False
    return rows <= side.format.product_rows(transpose=transpose)


def _in_float32(side: Packed) -> Packed:
    codes, *others = side.parts
    return Packed([codes, *(part.astype(mx.float32) for part in others)], side.format)


def _spans(side: Packed | mx.array, tile: int) -> list[tuple[int, int]]:
    tokens = side.shape[2]
    return [(t, min(t + tile, tokens)) for t in range(0, tokens, tile)]


def _unpacked(array: Packed | mx.array, start: int, stop: int) -> mx.array:
    """Tokens from start to stop as (batch, heads, 1, tokens, dim) in float32."""
    whole = (start, stop) == (0, array.shape[2])
    part = array if whole else array[:, :, start:stop]
    if not isinstance(part, Packed):
        part = part.astype(mx.float32)
    elif stop > start:
        part = part.format.tile(part.parts)
    else:
        part = part.stored(mx.float32)
    return mx.expand_dims(part, 2)


def _joined(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
