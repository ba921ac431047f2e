"""Converts a layer's new keys and values to rows of its cache, and rows to packed arrays.

The cache keeps the rows in planes, each one of mlx-lm's caches: one plane for each part of the
formats, or a single plane of rows in which all parts lie side by side.
"""

from collections.abc import Iterable, Sequence

import mlx.core as mx

from ..kernels import Platform
from .attention.kernels import pack_kernel
from .first_keys import FirstKeys
from .formats import Format, Interleaving
from .packed_array import Packed
from .plan import LayerFormat

Parts = tuple[mx.array, ...]


def planes_of(formats: LayerFormat, *, interleaved: bool) -> int:
    """Planes that a layer takes: one of interleaved rows, or one for each part."""
    sides = [format for format in (formats.keys, formats.values) if format is not None]
    if interleaved and all(isinstance(format, Interleaving) for format in sides):
        return 1
    return max((len(format.parts) for format in sides), default=2)


def encode(
    keys: mx.array,
    values: mx.array,
    formats: LayerFormat,
    platform: Platform,
) -> tuple[Parts, Parts]:
    """Pack keys and values into their parts.

    Args:
        keys: (batch, heads, length, dim).
        values: (batch, heads, length, value dim).
        formats: Fitted to the dimensions.
        platform: Where to pack.
    """
    if platform.compile is not None and pack_kernel.packs(keys, values, formats):
        found = pack_kernel.pack(platform, keys, values, formats)
        return tuple(found[:3]), tuple(found[3:])
    return _parts(keys, formats.keys), _parts(values, formats.values)


def _parts(array: mx.array, format: Format | None) -> Parts:
    """The parts of a packed array; without a format the array's bits and a part of zero width.

    mlx-lm's batches need one dtype for keys and values, so the bits of an unpacked side are stored.
    """
    if format is not None:
        return format.pack(array)
    return array.view(mx.uint32), array[..., :0]


def arrange(
    keys: Parts, values: Parts, formats: LayerFormat, planes: int
) -> Iterable[tuple[mx.array, mx.array]]:
    """The rows of keys and of values for each plane.

    The side with fewer parts gets parts of zero width; two planes or more hold all parts of both.
    """
    if planes == 1:
        return [(_joined(keys, formats.keys), _joined(values, formats.values))]
    return zip(_padded(keys, planes), _padded(values, planes), strict=True)


def rows_of(
    dims: tuple[int, int], dtype: str, formats: LayerFormat, planes: int
) -> Iterable[tuple[mx.array, mx.array]]:
    """The rows of keys and of values for each plane of a position that is all zeros.

    Args:
        dims: Dimensions of keys and of values.
        dtype: Name of theirs.
        formats: Fitted to the dimensions.
        planes: How many there are.
    """
    stored: mx.Dtype = getattr(mx, dtype)
    keys, values = _zeros(dims[0], formats.keys, stored), _zeros(dims[1], formats.values, stored)
    return arrange(keys, values, formats, planes)


def _zeros(dim: int, format: Format | None, dtype: mx.Dtype) -> Parts:
    if format is None:
        return _parts(mx.zeros((1, 1, 1, dim), dtype), None)
    codes, *others = format.widths(dim)
    words = mx.zeros((1, 1, 1, codes), mx.uint32)
    return (words, *(mx.zeros((1, 1, 1, width), dtype) for width in others))


def packed_of(
    rows: Sequence[tuple[mx.array, mx.array]],
    formats: LayerFormat,
    dtype: str | None,
    first: FirstKeys | None = None,
    platform: Platform | None = None,
) -> tuple[Packed | mx.array, Packed | mx.array]:
    """Undo `arrange`: keys and values, each a plain array where it has no format.

    Args:
        rows: Of keys and of values in each plane.
        formats: Fitted to the dimensions.
        dtype: Name of the unpacked dtype; None if nothing was packed yet.
        first: What the first keys differ by from what is packed; None for nothing.
        platform: Where attention reads them; None for where MLX's default device is.
    """
    keys, values = zip(*rows, strict=True)
    if len(rows) == 1:
        given = getattr(mx, dtype or "float32")
        keys = _split(keys[0], formats.keys, given)
        values = _split(values[0], formats.values, given)
    return (
        _packed(keys, formats.keys, platform, first),
        _packed(values, formats.values, platform),
    )


def _joined(parts: Parts, format: Format | None) -> mx.array:
    if format is None:
        return parts[0]
    assert isinstance(format, Interleaving)
    return format.join(parts)


def _split(words: mx.array, format: Format | None, dtype: mx.Dtype) -> Parts:
    if format is None:
        return words, mx.zeros((*words.shape[:-1], 0), dtype)
    assert isinstance(format, Interleaving)
    return format.split(words, dtype)


def _padded(parts: Parts, count: int) -> Parts:
    return parts if len(parts) == count else (*parts, *[parts[-1][..., :0]] * (count - len(parts)))


def _packed(
    parts: Parts,
    format: Format | None,
    platform: Platform | None,
    first: FirstKeys | None = None,
) -> Packed | mx.array:
    if format is None:
        return parts[0].view(parts[1].dtype)
    return Packed(parts[: len(format.parts)], format, first, platform)
