"""Packs new keys and values with one kernel launch, where MLX takes dozens."""

from collections.abc import Callable
from functools import cache

import mlx.core as mx

from ....kernels import PLACES, TYPES, Platform, header, name_of
from ...formats import Affine, CodeLayout, Format
from ...formats.affine_ranges import AROUND, FITS, share_of
from ...plan import LayerFormat
from .source import PARTS, root, source

#: Types that it packs.
DTYPES = (mx.bfloat16, mx.float16)
INPUTS = ("keys", "values", "centre", "matrix")
#: Up to this many positions the kernel turns rows itself; products of more are faster in MLX.
FEW = 8
#: How a row is turned before it is packed.
ASIS, ROTATED, MOVED = range(3)


def packs(keys: mx.array, values: mx.array, formats: LayerFormat) -> bool:
    """Whether the kernel can pack keys and values in these formats."""
    return (
        formats.keys is not None
        and formats.values is not None
        and formats.keys.packed_by_kernel
        and formats.values.packed_by_kernel
        and keys.dtype in DTYPES
        and values.dtype == keys.dtype
        and keys.shape[:3] == values.shape[:3]
        and keys.size > 0
    )


def pack(
    platform: Platform,
    keys: mx.array,
    values: mx.array,
    formats: LayerFormat,
    *,
    stacked: bool = False,
) -> list[mx.array]:
    """Pack keys and values.

    Args:
        platform: One that compiles kernels.
        keys: (batch, heads, length, dim).
        values: (batch, heads, length, value dim).
        formats: Formats of both, such that `packs` is true, fitted to their dimensions.
        stacked: Whether to write them as a `Stack`: keys and values must look alike then.

    Returns:
        Codes, scales and biases of the keys, then those of the values; or codes and words of both.
    """
    assert formats.keys is not None
    assert formats.values is not None
    sides = _sides(formats, keys.shape[3], values.shape[3], keys.shape[2] <= FEW)
    (_, key_turn), (_, value_turn) = sides
    call, threads, widths = _call(platform, *sides, keys.dtype, stacked)
    if key_turn == ASIS:
        keys = formats.keys.turn(keys)
    if value_turn == ASIS:
        values = formats.values.turn(values)
    move = (keys, keys)
    if key_turn == MOVED:
        assert isinstance(formats.keys, Affine)
        assert formats.keys.transform is not None
        move = formats.keys.transform.matrices[:2]
    shape = keys.shape[:3]
    if stacked:
        groups = widths[1] * keys.dtype.size // 2
        shapes = [(shape[0], 2 * shape[1], shape[2], width) for width in (widths[0], groups)]
        dtypes = [mx.uint32, mx.uint32]
    else:
        shapes = [(*shape, width) for width in widths]
        dtypes = [mx.uint32, keys.dtype, keys.dtype] * 2
    return call(
        inputs=[keys, values, *move],
        grid=(shape[0] * shape[1] * shape[2] * threads, 2, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=shapes,
        output_dtypes=dtypes,
    )


#: The layout of a side's codes, and how the kernel turns its rows.
Side = tuple[CodeLayout, int]


# Layers whose keys are transformed differ in their formats, and share kernels.
@cache
def _sides(formats: LayerFormat, key_dim: int, value_dim: int, few: bool) -> tuple[Side, Side]:
    return _side(formats.keys, key_dim, few), _side(formats.values, value_dim, few)


def _side(format: Format | None, dim: int, few: bool) -> Side:
    """Rows of many positions are turned by products of their own, which are faster then."""
    layout = format and format.code_layout(dim)
    assert layout is not None
    if few and isinstance(format, Affine):
        if format.transform is not None:
            return layout, MOVED
        if format.rotated and dim & (dim - 1) == 0:
            return layout, ROTATED
    return layout, ASIS


@cache
def _call(
    platform: Platform, keys: Side, values: Side, dtype: mx.Dtype, stacked: bool
) -> tuple[Callable[..., list[mx.array]], int, tuple[int, ...]]:
    """The kernel, its threads, and the widths of its outputs."""
    name = str(dtype).removeprefix("mlx.core.")
    lines = ["namespace family {}", f"typedef {TYPES[platform.name][name]} T;"]
    groups, widths, longest = [], [], 0
    for prefix, (layout, turn) in (("K", keys), ("V", values)):
        bits, size, dim = layout.bits, layout.group_size, layout.dim
        share = share_of(bits, size)
        starts = len(AROUND) if share else 0
        numbers = {"BITS": bits, "GROUP": size, "DIM": dim, "STARTS": starts}
        lines += [f"constexpr CONSTANT int {prefix}_{key} = {n};" for key, n in numbers.items()]
        first = (share or 1.0) + AROUND[0]
        lines.append(f"constexpr CONSTANT float {prefix}_SHARE = {first!r}f;")
        lines += [f"#define {prefix}_TURN {turn}", root(prefix, dim)]
        groups.append(dim // size)
        widths += [dim * bits // 32, dim // size, dim // size]
        longest = max(longest, size)
    threads = 32 * max(groups)
    lines += [
        f"constexpr CONSTANT float AROUND = {AROUND[1] - AROUND[0]!r}f;",
        f"constexpr CONSTANT int PACK_FITS = {FITS};",
        f"constexpr CONSTANT int PACK_THREADS = {threads};",
        f"constexpr CONSTANT int PACK_GROUP = {longest};",
        f"constexpr CONSTANT int PACK_DIM = {max(keys[0].dim, values[0].dim)};",
        f"#define STACKED {int(stacked)}",
        f"constexpr CONSTANT int ROTATED = {ROTATED}, MOVED = {MOVED};",
    ]
    above = "\n".join([header(platform.name), *lines, source("turn.h"), source("pack.h")])
    body = PLACES[platform.name] + source("pack.body")
    assert platform.compile is not None
    kernel = platform.compile(
        name=name_of(platform.name, above, body),
        input_names=list(INPUTS),
        output_names=["codes", "words"] if stacked else list(PARTS),
        header=above,
        source=body,
        ensure_row_contiguous=False,
    )
    return kernel, threads, tuple(widths)
