"""Keys or values in packed form: MLX's affine quantization along the head dimension."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..errors import UnsupportedError
from .rounding import pack

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Format:
    """How keys or values are stored.

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

    def __str__(self) -> str:
        size = f"g{self.group_size}" if self.group_size else ""
        return f"{self.bits}{size}{'r' if self.rotated else ''}"


def rotatable(dim: int) -> bool:
    """Whether MLX has a Hadamard transform of this size."""
    odd = dim // (dim & -dim)
    return odd == 1 or (odd in (3, 5, 7) and dim % 4 == 0)


def rotate(array: mx.array) -> mx.array:
    """Rotate the last axis by the normalised Hadamard matrix."""
    return mx.hadamard_transform(array, scale=array.shape[-1] ** -0.5)


def rotate_back(array: mx.array) -> mx.array:
    """Undo `rotate`.

    The matrices of 2^k are symmetric and undo themselves; the others are not, so they are
    multiplied with their transpose.
    """
    dim = array.shape[-1]
    if dim & (dim - 1) == 0:
        return rotate(array)
    matrix = rotate(mx.eye(dim, dtype=array.dtype))
    return array @ matrix.T


class Packed:
    """An array of keys or values (batch, heads, length, dim) in packed form.

    Attributes:
        parts: Codes (uint32), scales and biases, each (batch, heads, length, its own width).
        format: How they are packed, with its group size.
    """

    __slots__ = ("format", "parts")

    def __init__(self, parts: Sequence[mx.array], format: Format):
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
        codes, scales, biases = self.parts
        dtype = dtype or self.dtype
        if codes.size == 0:  # a row of a batch that holds nothing yet
            return mx.zeros(self.shape, dtype)
        return mx.dequantize(
            codes,
            scales.astype(dtype),
            biases.astype(dtype),
            group_size=self.format.group_size,
            bits=self.format.bits,
        )

    def plain(self, dtype: mx.Dtype | None = None) -> mx.array:
        """The array that it stands for, up to rounding."""
        array = self.stored(dtype)
        return rotate_back(array) if self.format.rotated and array.size else array
