"""Packs new keys and values with one kernel launch, where MLX takes dozens."""

from collections.abc import Callable
from functools import cache

import mlx.core as mx

from ....kernels import PLACES, TYPES, Platform, header, name_of
from ...formats import CodeLayout
from ...formats.affine_ranges import AROUND, FITS, share_of
from ...plan import LayerFormat
from .source import PARTS, source

#: Types that it packs.
DTYPES = (mx.bfloat16, mx.float16)
INPUTS = ("keys", "values")


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
    platform: Platform, keys: mx.array, values: mx.array, formats: LayerFormat
) -> list[mx.array]:
    """Codes, scales and biases of the keys, then those of the values.

    Args:
        platform: One that compiles kernels.
        keys: (batch, heads, length, dim).
        values: (batch, heads, length, value dim).
        formats: Formats of both, such that `packs` is true, fitted to their dimensions.
    """
    assert formats.keys is not None
    assert formats.values is not None
    layouts = _layouts(formats, keys.shape[3], values.shape[3])
    call, threads, widths = _call(platform, *layouts, keys.dtype)
    shape = keys.shape[:3]
    return call(
        inputs=[formats.keys.turn(keys), formats.values.turn(values)],
        grid=(shape[0] * shape[1] * shape[2] * threads, 2, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(*shape, width) for width in widths],
        output_dtypes=[mx.uint32, keys.dtype, keys.dtype] * 2,
    )


# Layers whose keys are transformed differ in their formats, and share kernels.
@cache
def _layouts(formats: LayerFormat, key_dim: int, value_dim: int) -> tuple[CodeLayout, CodeLayout]:
    keys = formats.keys and formats.keys.code_layout(key_dim)
    values = formats.values and formats.values.code_layout(value_dim)
    assert keys is not None
    assert values is not None
    return keys, values


@cache
def _call(
    platform: Platform, keys: CodeLayout, values: CodeLayout, dtype: mx.Dtype
) -> tuple[Callable[..., list[mx.array]], int, tuple[int, ...]]:
    """The kernel, its threads, and the widths of its outputs."""
    name = str(dtype).removeprefix("mlx.core.")
    lines = ["namespace family {}", f"typedef {TYPES[platform.name][name]} T;"]
    groups, widths, longest = [], [], 0
    for prefix, layout in (("K", keys), ("V", values)):
        bits, size, dim = layout.bits, layout.group_size, layout.dim
        share = share_of(bits, size)
        starts = len(AROUND) if share else 0
        numbers = {"BITS": bits, "GROUP": size, "DIM": dim, "STARTS": starts}
        lines += [f"constexpr CONSTANT int {prefix}_{key} = {n};" for key, n in numbers.items()]
        first = (share or 1.0) + AROUND[0]
        lines.append(f"constexpr CONSTANT float {prefix}_SHARE = {first!r}f;")
        groups.append(dim // size)
        widths += [dim * bits // 32, dim // size, dim // size]
        longest = max(longest, size)
    threads = 32 * max(groups)
    lines += [
        f"constexpr CONSTANT float AROUND = {AROUND[1] - AROUND[0]!r}f;",
        f"constexpr CONSTANT int PACK_FITS = {FITS};",
        f"constexpr CONSTANT int PACK_THREADS = {threads};",
        f"constexpr CONSTANT int PACK_GROUP = {longest};",
    ]
    above = "\n".join([header(platform.name), *lines, source("pack.h")])
    body = PLACES[platform.name] + source("pack.body")
    assert platform.compile is not None
    kernel = platform.compile(
        name=name_of(platform.name, above, body),
        input_names=list(INPUTS),
        output_names=list(PARTS),
        header=above,
        source=body,
        ensure_row_contiguous=False,
    )
    return kernel, threads, tuple(widths)
