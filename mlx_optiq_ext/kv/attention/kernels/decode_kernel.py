"""Decoding with our own kernels: one attends to splits of the packed data, one joins them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import mlx.core as mx

from ....kernels import Platform, name_of
from ...formats import Affine, CodeLayout, Format
from ...packed_array import Packed
from .source import COMBINE, DECODE, STACKED, WARPS, Family, combine, decode

#: Head dimensions, group sizes and types that the kernels are written for.
DIMS, GROUP_SIZES, DTYPES = (64, 96, 128, 256), (32, 64, 128), (mx.bfloat16, mx.float16)
#: Most queries of a head: a token and what speculation adds.
QUERIES = 8
#: Blocks to spread a call over: two on each multiprocessor of an H100 or H200, and enough for
#: smaller devices.
BLOCKS = 264
#: Tokens that a warp takes at a time.
TILE = 16
LOG2E = math.log2(math.e)


def supports(
    queries: mx.array,
    keys: Packed | mx.array,
    values: Packed | mx.array,
    mask: mx.array | str | None,
) -> bool:
    """Whether the kernels can compute this call."""
    if not (isinstance(keys, Packed) and isinstance(values, Packed)):
        return False
    tokens, dim = keys.shape[2:]
    if (near := keys.recent) is not None and tokens - near.floor < queries.shape[2] + near.count:
        return False
    return (
        tokens >= TILE
        and (mask is None or isinstance(mask, mx.array) or mask == "causal")
        and 0 < queries.shape[2] <= QUERIES
        and _fits(keys.format, dim, queries.dtype, keys.dtype)
        and _fits(values.format, values.shape[3], queries.dtype, values.dtype)
    )


# A decoding step calls this once for each layer: one look-up finds all that does not change.
@cache
def _fits(format: Format, dim: int, queries: mx.Dtype, stored: mx.Dtype) -> bool:
    layout = format.code_layout(dim)
    return (
        layout is not None
        and queries in DTYPES
        and stored == queries
        and dim in DIMS
        and (layout.group_size in GROUP_SIZES or bool(layout.levels))
    )


def attend(
    platform: Platform,
    queries: mx.array,
    keys: Packed,
    values: Packed,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
    *,
    dtype: mx.Dtype | None = None,
    blocks: int = BLOCKS,
    turn_back: bool = False,
) -> mx.array:
    """Attention in the stored basis; see `mlx_optiq_ext.kv.attend`.

    Args:
        platform: A platform that compiles kernels.
        queries: (batch, query heads, length, dim).
        keys: (batch, heads, tokens, dim), packed.
        values: (batch, heads, tokens, value dim), packed.
        scale: Factor on the scores.
        mask: None, ``"causal"`` or an array.
        sinks: (query heads,) or None.
        dtype: Dtype of the output; the queries' by default.
        blocks: Blocks to spread the call over.
        turn_back: Whether the output is brought back from the basis of the values.
    """
    batch, query_heads, length, _ = queries.shape
    _, heads, tokens, dim = keys.shape
    value_dim = values.shape[3]
    stack = keys.stack if keys.stack is values.stack else None
    out = dtype or queries.dtype
    kind, rows = _NO_MASK if mask is None else _mask(mask, (batch, query_heads, length, tokens))
    rotated = turn_back and rotates(values.format, value_dim)
    call = _call(
        platform, _layout(keys.format, dim), _layout(values.format, value_dim),
        query_heads // heads, length, scale, kind, sinks is not None,
        0 if keys.first is None else keys.first.count, queries.dtype, out, rotated,
        stack is not None, 0 if keys.recent is None else keys.recent.count,
        keys.recent is not None and keys.recent.end is not None,
    )  # fmt: skip
    lost, starts = _firsts(queries, keys)
    splits = blocks // (batch * heads * call.chunks)
    splits = max(1, min(splits, -(-tokens // (TILE * WARPS))))
    shape = (batch, heads, splits, call.rows)
    states, parts = call.decode(
        inputs=[
            *(queries, *(stack[:2] if stack else (*_parts(keys), *_parts(values)))),
            queries if rows is None else rows,
            lost,
            starts,
        ],
        grid=(splits * WARPS * 32, heads, batch * call.chunks),
        threadgroup=(WARPS * 32, 1, 1),
        output_shapes=[(*shape, 2), (*shape, call.dim)],
        output_dtypes=_FLOATS,
    )
    output = call.combine(
        inputs=[
            states,
            parts,
            queries if sinks is None else sinks.astype(mx.float32),
            queries,
            queries if rows is None else rows,
            *_near(queries, keys, values),
            starts,
        ],
        grid=(call.joiners * call.dim, heads * call.rows, batch),
        threadgroup=(call.joiners * call.dim, 1, 1),
        output_shapes=[(batch, query_heads, length, call.dim)],
        output_dtypes=[out],
    )[0]
    return values.format.turn_back(output) if turn_back and not rotated else output


_FLOATS = [mx.float32, mx.float32]
#: Without a mask, sinks or first keys the kernels get the queries in that place and ignore them.
_NO_MASK = ("none", None)


def _parts(side: Packed) -> tuple[mx.array, ...]:
    codes, scales, *biases = side.parts
    return codes, scales, biases[0] if biases else scales


def _firsts(queries: mx.array, keys: Packed) -> tuple[mx.array, mx.array]:
    """What the first keys lost, in the queries' dtype, and where each row begins.

    A sliding window keeps no first keys; in place of rows' beginnings it says where it ends.
    """
    if keys.recent is not None and keys.recent.end is not None:
        return queries, _ints(keys.recent.end, keys.recent.floor)
    if keys.first is None:
        return queries, queries
    starts = keys.first.starts
    starts = _ints(*[0] * queries.shape[0]) if starts is None else starts
    return keys.first.residuals.astype(queries.dtype), starts.astype(mx.int32)


def _near(queries: mx.array, keys: Packed, values: Packed) -> tuple[mx.array, mx.array]:
    """The last keys and values as they were computed, in the queries' dtype."""
    if keys.recent is None or values.recent is None:
        return queries, queries
    return keys.recent.exact.astype(queries.dtype), values.recent.exact.astype(queries.dtype)


@lru_cache(maxsize=256)
def _ints(*numbers: int) -> mx.array:
    return mx.array(numbers, mx.int32)


def _mask(mask: mx.array | str, shape: tuple[int, ...]) -> tuple[str, mx.array | None]:
    """The mask's kind in `MASKS`, and the mask broadcast to the shape of the scores, uncopied."""
    if isinstance(mask, str):
        return mask, None
    if mask.dtype == mx.bool_:
        return "bool", mx.broadcast_to(mask, shape)
    return "added", mx.broadcast_to(mask.astype(mx.float32), shape)


@dataclass(frozen=True)
class _Call:
    """The kernels of a family, and the constants of their launch."""

    rows: int
    chunks: int
    joiners: int
    dim: int
    decode: Callable[..., list[mx.array]]
    combine: Callable[..., list[mx.array]]


@cache
def _call(
    platform: Platform,
    keys: CodeLayout,
    values: CodeLayout,
    repeats: int,
    length: int,
    scale: float,
    mask: str,
    sinks: bool,
    firsts: int,
    dtype: mx.Dtype,
    out: mx.Dtype,
    rotated: bool,
    stacked: bool,
    recent: int,
    ring: bool,
) -> _Call:
    names = tuple(str(d).removeprefix("mlx.core.") for d in (dtype, out))
    family = Family(
        keys,
        values,
        repeats,
        length,
        scale,
        mask,
        sinks,
        firsts,
        names[0],
        names[1],
        stacked,
        recent,
        ring,
    )
    make = platform.compile
    assert make is not None
    kernels = [
        make(
            name=name_of(platform.name, *names, *texts),
            input_names=list(names[0]),
            output_names=list(names[1]),
            header=texts[0],
            source=texts[1],
            ensure_row_contiguous=False,
        )
        for names, texts in (
            (STACKED if stacked else DECODE, decode(family, platform.name)),
            (COMBINE, combine(family, platform.name, rotated=rotated)),
        )
    ]
    return _Call(family.rows, family.chunks, family.joiners, family.values.dim, *kernels)


@cache
def rotates(format: Format, dim: int) -> bool:
    """Whether the kernels rotate vectors of this format themselves."""
    return isinstance(format, Affine) and bool(format.rotated) and dim & (dim - 1) == 0


# Layers whose keys are transformed differ in their formats, and share kernels.
@cache
def _layout(format: Format, dim: int) -> CodeLayout:
    layout = format.code_layout(dim)
    assert layout is not None  # else `supports` is false
    return layout
