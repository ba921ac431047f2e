"""Attention on a CPU, in blocks of queries and tiles of tokens.

MLX has no fused kernel there, and half precision is emulated: tiles are unpacked to float32, and
never more scores exist than one block of queries needs. For so few queries that unpacking costs
more than it saves, MLX's quantized products read packed data as it is.
"""

from collections.abc import Callable
from functools import cache
from typing import TypeGuard

import mlx.core as mx

from ..packed import Format, Packed
from .composed import product
from .scores import grouped, probabilities, rows_of

#: Queries of a block.
QUERIES = 256
#: Tokens of a tile.
TOKENS = 1024
#: Queries of a key/value head up to which a quantized product is faster, by bits: times its keys,
#: and times its values (measured in float32, tests/benchmarks/kv_attention.py).
KEY_ROWS = {2: 2, 3: 10, 4: 2, 5: 14, 6: 20, 8: 2}
VALUE_ROWS = {2: 3, 3: 10, 4: 6, 5: 14, 6: 20, 8: 5}


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
    rows = queries.shape[1] // heads * min(length, QUERIES)
    score, weigh = _scores(keys, rows), _outputs(values, rows)
    outputs = []
    for start in range(0, length, QUERIES):
        stop = min(start + QUERIES, length)
        block = grouped(queries[:, :, start:stop].astype(mx.float32) * scale, heads)
        weights = probabilities(score(block), rows_of(mask, start, stop, length, tokens), sinks)
        outputs.append(weigh(weights).flatten(1, 2).astype(queries.dtype))
        if length > QUERIES:
            mx.eval(outputs)  # else MLX sets memory aside for many blocks before it runs the first
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def _scores(keys: Packed | mx.array, rows: int) -> Callable[[mx.array], mx.array]:
    """``block -> block @ keys.T`` over (batch, heads, repeats, length, ...)."""
    if _direct(keys, rows, KEY_ROWS):
        exact = _in_float32(keys)
        return lambda block: product(block, exact, transpose=True)
    tiles = [_tile(keys, *span).swapaxes(-1, -2) for span in _spans(keys)]
    return lambda block: _joined([block @ tile for tile in tiles])


def _outputs(values: Packed | mx.array, rows: int) -> Callable[[mx.array], mx.array]:
    """``weights -> weights @ values``."""
    if _direct(values, rows, VALUE_ROWS):
        exact = _in_float32(values)
        return lambda weights: product(weights, exact, transpose=False)
    spans = _spans(values)
    tiles = [_tile(values, *span) for span in spans]

    def weigh(weights: mx.array) -> mx.array:
        parts = [weights[..., slice(*span)] @ tile for span, tile in zip(spans, tiles, strict=True)]
        return sum(parts[1:], start=parts[0])

    return weigh


def _direct(side: Packed | mx.array, rows: int, limits: dict[int, int]) -> TypeGuard[Packed]:
    return (
        isinstance(side, Packed)
        and isinstance(side.format, Format)
        and rows <= limits[side.format.bits]
    )


def _in_float32(side: Packed) -> Packed:
    codes, *others = side.parts
    return Packed([codes, *(part.astype(mx.float32) for part in others)], side.format)


def _spans(side: Packed | mx.array) -> list[tuple[int, int]]:
    tokens = side.shape[2]
    return [(t, min(t + TOKENS, tokens)) for t in range(0, tokens, TOKENS)]


def _tile(array: Packed | mx.array, start: int, stop: int) -> mx.array:
    """Tokens from start to stop as (batch, heads, 1, tokens, dim) in float32."""
    whole = (start, stop) == (0, array.shape[2])
    part = array if whole else array[:, :, start:stop]
    if not isinstance(part, Packed):
        part = part.astype(mx.float32)
    elif isinstance(part.format, Format) and 32 % part.format.bits == 0 and stop > start:
        part = _unpacked(part, part.format.bits)
    else:
        part = part.stored(mx.float32)
    return mx.expand_dims(part, 2)


def _unpacked(part: Packed, bits: int) -> mx.array:
    """What ``mx.dequantize`` gives in float32, in a third of its time here."""
    codes, scales, biases = part.parts
    codes = mx.unflatten(codes, -1, (scales.shape[-1], -1))
    return _affine(bits)(codes, scales[..., None], biases[..., None]).flatten(-3)


@cache
def _affine(bits: int) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
    """Words (..., groups, words) and (..., groups, 1) to (..., groups, words, codes of a word)."""

    def affine(words: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        places = bits * mx.arange(32 // bits, dtype=mx.uint32)
        codes = mx.right_shift(words[..., None], places) & (2**bits - 1)
        scales, biases = (each[..., None].astype(mx.float32) for each in (scales, biases))
        return codes.astype(mx.float32) * scales + biases

    return mx.compile(affine, shapeless=True)


def _joined(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
