"""Keys or values in packed form, along the head dimension."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeAlias

import mlx.core as mx

from ..errors import UnsupportedError
from ..turboquant.format import TurboFormat
from ..turboquant.hadamard import rotatable, rotate, rotate_back
from .rounding import pack

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Format:
    """How keys or values are stored: MLX's affine quantization.

    Attributes:
        bits: Width of a code.
        group_size: Elements that share a scale and a bias; None for the largest of 64 and 32 that
            divides the head dimension.
        rotated: Whether a Hadamard rotation spreads outliers over the head dimension before packing
            (QuaRot, Ashkboos et al., arXiv 2404.00456).
    """

    bits: int
    group_size: int | None = None
    rotated: bool = False

    @cache  # noqa: B019 - formats and dimensions are few
    def fitted(self, dim: int) -> "Format":
        """The same with a group size that divides ``dim``.

        Raises:
            UnsupportedError: MLX cannot pack, or not rotate, a head dimension of ``dim``.
        """
        sizes = (64, 32) if self.group_size is None else (self.group_size,)
        fitting = [size for size in sizes if dim % size == 0]
        if not fitting:
            raise UnsupportedError(
                f"keys or values of width {dim} do not divide into groups of "
                f"{' or '.join(map(str, sizes))}: leave this layer out of the KV plan"
                + (" or use a smaller group size" if self.group_size not in (None, 32) else "")
            )
        if self.rotated and not rotatable(dim):
            raise UnsupportedError(
                f"keys or values of width {dim} have no Hadamard rotation (2^k, or 12, 20 or 28 "
                "times it): switch the rotation off for this layer"
            )
        return replace(self, group_size=fitting[0])

    @property
    def bits_per_element(self) -> float:
        """Stored bits of an element, with its share of a 16-bit scale and bias."""
        return self.bits + 32 / (self.group_size or 64)

    def pack(self, array: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Pack (..., dim) into codes, scales and biases, each (..., its own width)."""
        if self.rotated:
            array = rotate(array)
        return pack(array, self.bits, self.group_size or 64)

    def unpack(self, parts: Sequence[mx.array], dtype: mx.Dtype) -> mx.array:
        """Undo `pack`, but for the rotation."""
        codes, scales, biases = parts
        return mx.dequantize(
            codes,
            scales.astype(dtype),
            biases.astype(dtype),
            group_size=self.group_size,
            bits=self.bits,
        )

    def turn(self, array: mx.array) -> mx.array:
        """Rotate (..., dim) as what is packed was, if it was."""
        return rotate(array) if self.rotated else array

    def turn_back(self, array: mx.array) -> mx.array:
        """Undo `turn`."""
        return rotate_back(array) if self.rotated else array

    def levels(self, dim: int) -> tuple[float, ...]:
        """Nothing: codes stand for multiples of a group's scale."""
        return ()

    def __str__(self) -> str:
        size = f"g{self.group_size}" if self.group_size else ""
        return f"{self.bits}{size}{'r' if self.rotated else ''}"


#: What keys and values can be packed with.
AnyFormat: TypeAlias = Format | TurboFormat


class Packed:
    """An array of keys or values (batch, heads, length, dim) in packed form.

    Attributes:
        parts: Codes (uint32), scales (or norms) and biases, each (batch, heads, length, its own
            width).
        format: How they are packed, with its group size.
    """

    __slots__ = ("format", "parts")

    def __init__(self, parts: Sequence[mx.array], format: AnyFormat):
        self.parts = tuple(parts)
        self.format = format

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that it stands for."""
        codes = self.parts[0]
        return (*codes.shape[:-1], codes.shape[-1] * 32 // self.format.bits)

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the array that it stands for."""
        return self.parts[1].dtype

    @property
    def ndim(self) -> int:
        """Number of its axes."""
        return self.parts[0].ndim

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(part.nbytes for part in self.parts)

    def __getitem__(self, index: Any) -> "Packed":
        """Index the axes before the last."""
        return Packed([part[index] for part in self.parts], self.format)

    def stored(self, dtype: mx.Dtype | None = None) -> mx.array:
        """The array as it was packed, that is rotated if the format is."""
        dtype = dtype or self.dtype
        if self.parts[0].size == 0:  # a row of a batch that holds nothing yet
            return mx.zeros(self.shape, dtype)
        return self.format.unpack(self.parts, dtype)

    def plain(self, dtype: mx.Dtype | None = None) -> mx.array:
        """The array that it stands for, up to rounding."""
        array = self.stored(dtype)
        return self.format.turn_back(array) if array.size else array


def joined(parts: Sequence[mx.array]) -> mx.array:
    """Codes, scales and biases of affine packing side by side, in uint32 words."""
    codes, *others = parts
    if others[0].shape[-1] == 0:  # an array that stays as it is
        return codes
    if others[0].dtype.size < 4:  # only together do they surely fill words
        others = [mx.concatenate(others, axis=-1)]
    return mx.concatenate([codes, *(part.view(mx.uint32) for part in others)], axis=-1)


def split(
    words: mx.array, format: AnyFormat | None, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array]:
    """Undo `joined` for scales and biases of ``dtype``."""
    if format is None:
        empty = mx.zeros((*words.shape[:-1], 0), dtype)
        return words, empty, empty
    scale_words = dtype.size // 2  # of a scale and a bias
    groups = words.shape[-1] // ((format.group_size or 64) * format.bits // 32 + scale_words)
    width = words.shape[-1] - groups * scale_words
    rest = words[..., width:].view(dtype)
    return words[..., :width], rest[..., :groups], rest[..., groups:]
