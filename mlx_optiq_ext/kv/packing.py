"""New keys and values of a layer, in the parts that its cache holds."""

import mlx.core as mx

from .attention.dispatch import backend, has_kernel
from .attention.kernels import packing
from .packed import AnyFormat

Parts = tuple[mx.array, mx.array, mx.array]


def parts_of(
    keys: mx.array,
    values: mx.array,
    keys_format: AnyFormat | None,
    values_format: AnyFormat | None,
) -> tuple[Parts, Parts]:
    """Codes, scales and biases of both.

    Args:
        keys: (batch, heads, length, dim).
        values: (batch, heads, length, value dim).
        keys_format: Fitted to the dimension; None keeps them as they come.
        values_format: As for the keys.
    """
    formats: tuple = (keys_format, values_format)
    name = backend()
    if name != "cpu" and has_kernel(name) and packing.packs(keys, values, formats):
        found = packing.pack(name, keys, values, formats)
        return (found[0], found[1], found[2]), (found[3], found[4], found[5])
    return _parts(keys, keys_format), _parts(values, values_format)


def _parts(array: mx.array, format: AnyFormat | None) -> Parts:
    """Of an array that stays as it is, itself and two of no width.

    mlx-lm's batches give keys and values one type, so its bits are taken for codes.
    """
    if format is not None:
        return format.pack(array)
    return array.view(mx.uint32), array[..., :0], array[..., :0]
