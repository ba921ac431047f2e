"""Converts a layer's new keys and values to rows of its cache, and rows to packed arrays.

The cache keeps the rows in planes, each one of mlx-lm's caches: one plane for each part of the
formats, or a single plane of rows in which all parts lie side by side.
"""

from collections.abc import Sequence

import mlx.core as mx

from ..kernels import Platform
from .attention.kernels import pack_kernel
from .formats import Affine, Format, Interleaving
from .kept.first_keys import FirstKeys
from .packed_array import Packed, Stack
from .plan import LayerFormat

Parts = tuple[mx.array, ...]
#: What each plane gets for keys and for values.
Rows = Sequence[tuple[mx.array, mx.array]]

#: All parts of a position in one row; the codes of keys and values in one array, their scales and
#: biases in another (see `Stack`); or an array for each part.
LAYOUTS = ("interleaved", "stacked", "apart")


def layout_of(formats: LayerFormat, *, interleaved: bool, stacked: bool = False) -> str:
    """How a layer's parts lie, one of `LAYOUTS`: as asked, if the formats allow it."""
    sides = [format for format in (formats.keys, formats.values) if format is not None]
    if interleaved and all(isinstance(format, Interleaving) for format in sides):
        return "interleaved"
    return "stacked" if stacked and stackable(formats) else "apart"


def stackable(formats: LayerFormat) -> bool:
    """Whether packed keys and values look alike, if their head dimensions are the same."""
    keys, values = formats.keys, formats.values
    return (
        isinstance(keys, Affine)
        and isinstance(values, Affine)
        and (keys.bits, keys.group_size) == (values.bits, values.group_size)
    )


def planes_of(formats: LayerFormat, layout: str) -> int:
    """Planes that a layer takes."""
    if layout != "apart":
        return 1
    sides = [format for format in (formats.keys, formats.values) if format is not None]
    return max((len(format.parts) for format in sides), default=2)


def encode(
    keys: mx.array,
    values: mx.array,
    formats: LayerFormat,
    platform: Platform,
    layout: str,
) -> Rows:
    """Pack keys and values into the rows of their planes.

    Args:
        keys: (batch, heads, length, dim).
        values: (batch, heads, length, value dim).
        formats: Fitted to the dimensions.
        platform: Where to pack.
        layout: One of `LAYOUTS`.
    """
    if platform.compile is not None and pack_kernel.packs(keys, values, formats):
        stacked = layout == "stacked"
        found = pack_kernel.pack(platform, keys, values, formats, stacked=stacked)
        if stacked:
            return [(found[0], found[1])]
        sides = tuple(found[:3]), tuple(found[3:])
    else:
        sides = _parts(keys, formats.keys), _parts(values, formats.values)
    return arrange(*sides, formats, layout)


def _parts(array: mx.array, format: Format | None) -> Parts:
    """The parts of a packed array; without a format the array's bits and a part of zero width.

    mlx-lm's batches need one dtype for keys and values, so the bits of an unpacked side are stored.
    """
    if format is not None:
        return format.pack(array)
    return array.view(mx.uint32), array[..., :0]


def arrange(keys: Parts, values: Parts, formats: LayerFormat, layout: str) -> Rows:
    """The rows of keys and of values for each plane.

    Apart, the side with fewer parts gets parts of zero width.
    """
    if layout == "interleaved":
        return [(_joined(keys, formats.keys), _joined(values, formats.values))]
    if layout == "stacked":
        codes = mx.concatenate([keys[0], values[0]], axis=1)
        words = [mx.concatenate(list(side[1:]), axis=-1).view(mx.uint32) for side in (keys, values)]
        return [(codes, mx.concatenate(words, axis=1))]
    planes = planes_of(formats, layout)
    return list(zip(_padded(keys, planes), _padded(values, planes), strict=True))


def rows_of(dims: tuple[int, int], dtype: str, formats: LayerFormat, layout: str) -> Rows:
    """The rows of keys and of values for each plane of a position that is all zeros.

    Args:
        dims: Dimensions of keys and of values.
        dtype: Name of theirs.
        formats: Fitted to the dimensions.
        layout: One of `LAYOUTS`.
    """
    stored: mx.Dtype = getattr(mx, dtype)
    keys, values = _zeros(dims[0], formats.keys, stored), _zeros(dims[1], formats.values, stored)
    return arrange(keys, values, formats, layout)


def _zeros(dim: int, format: Format | None, dtype: mx.Dtype) -> Parts:
    if format is None:
        return _parts(mx.zeros((1, 1, 1, dim), dtype), None)
    codes, *others = format.widths(dim)
    words = mx.zeros((1, 1, 1, codes), mx.uint32)
    return (words, *(mx.zeros((1, 1, 1, width), dtype) for width in others))


def packed_of(
    rows: Rows,
    formats: LayerFormat,
    dtype: str | None,
    layout: str,
    first: FirstKeys | None = None,
    platform: Platform | None = None,
) -> tuple[Packed | mx.array, Packed | mx.array]:
    """Undo `arrange`: keys and values, each a plain array where it has no format.

    Args:
        rows: Of keys and of values in each plane.
        formats: Fitted to the dimensions.
        dtype: Name of the unpacked dtype; None if nothing was packed yet.
        layout: One of `LAYOUTS`.
        first: What the first keys differ by from what is packed; None for nothing.
        platform: Where attention reads them; None for where MLX's default device is.
    """
    given = getattr(mx, dtype or "float32")
    if layout == "stacked":
        assert formats.keys is not None
        assert formats.values is not None
        stack = Stack(*rows[0], given)
        return (
            Packed.of_stack(stack, 0, formats.keys, first, platform),
            Packed.of_stack(stack, 1, formats.values, None, platform),
        )
    keys, values = zip(*rows, strict=True)
    if layout == "interleaved":
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
