"""Packing new keys and values with a kernel of our own: one launch for what takes MLX dozens."""

from collections.abc import Callable
from functools import cache

import mlx.core as mx

from ...packed import Format
from ...rounding import AROUND, FITS, share_of
from .source import PARTS, PLACES, TYPES, name_of, text

#: Types that it packs.
DTYPES = (mx.bfloat16, mx.float16)
INPUTS = ("keys", "values")


def packs(keys: mx.array, values: mx.array, formats: tuple[object, object]) -> bool:
    """Whether the kernel can pack these."""
    return (
        all(type(format) is Format for format in formats)
        and keys.dtype in DTYPES
        and values.dtype == keys.dtype
        and keys.shape[:3] == values.shape[:3]
        and keys.size > 0
    )


def pack(
    platform: str, keys: mx.array, values: mx.array, formats: tuple[Format, Format]
) -> list[mx.array]:
    """Codes, scales and biases of the keys, then those of the values.

    Args:
        platform: ``"cuda"`` or ``"metal"``.
        keys: (batch, heads, length, dim).
        values: (batch, heads, length, value dim).
        formats: Of both, fitted to their dimensions.
    """
    call, threads, widths = _call(platform, formats, keys.shape[3], values.shape[3], keys.dtype)
    shape = keys.shape[:3]
    return call(
        inputs=[f.turn(a) for f, a in zip(formats, (keys, values), strict=True)],
        grid=(shape[0] * shape[1] * shape[2] * threads, 2, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(*shape, width) for width in widths],
        output_dtypes=[mx.uint32, keys.dtype, keys.dtype] * 2,
    )


@cache
def _call(
    platform: str,
    formats: tuple[Format, Format],
    key_dim: int,
    value_dim: int,
    dtype: mx.Dtype,
) -> tuple[Callable[..., list[mx.array]], int, tuple[int, ...]]:
    """The kernel, its threads, and the widths of its outputs."""
    name = str(dtype).removeprefix("mlx.core.")
    lines = ["namespace family {}", f"typedef {TYPES[platform][name]} T;"]
    groups, widths = [], []
    for prefix, format, dim in zip("KV", formats, (key_dim, value_dim), strict=True):
        size = format.group_size or dim
        share = share_of(format.bits, size)
        starts = len(AROUND) if share else 0
        numbers = {"BITS": format.bits, "GROUP": size, "DIM": dim, "STARTS": starts}
        lines += [f"constexpr CONSTANT int {prefix}_{key} = {n};" for key, n in numbers.items()]
        first = (share or 1.0) + AROUND[0]
        lines.append(f"constexpr CONSTANT float {prefix}_SHARE = {first!r}f;")
        groups.append(dim // size)
        widths += [dim * format.bits // 32, dim // size, dim // size]
    threads = 32 * max(groups)
    lines += [
        f"constexpr CONSTANT float AROUND = {AROUND[1] - AROUND[0]!r}f;",
        f"constexpr CONSTANT int PACK_FITS = {FITS};",
        f"constexpr CONSTANT int PACK_THREADS = {threads};",
        f"constexpr CONSTANT int PACK_GROUP = {max(f.group_size or 0 for f in formats)};",
    ]
    header = "\n".join([text(f"{platform}.h"), *lines, text("pack.h")])
    body = PLACES[platform] + text("pack.body")
    kernel = getattr(mx.fast, f"{platform}_kernel")(
        name=name_of(platform, header, body),
        input_names=list(INPUTS),
        output_names=list(PARTS),
        header=header,
        source=body,
        ensure_row_contiguous=False,
    )
    return kernel, threads, tuple(widths)
