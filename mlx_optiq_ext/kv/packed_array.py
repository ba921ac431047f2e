"""Keys or values in packed form, along the head dimension."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..kernels import Platform
from .first_keys import FirstKeys
from .formats import Format


class Packed:
    """An array of keys or values (batch, heads, length, dim) in packed form.

    Attributes:
        parts: Parts that the format packs into, each (batch, heads, length, its own width).
        format: The format, fitted to the head dimension.
        first: What the first keys differ by from what is packed; None for nothing.
        platform: Where attention reads it; None for where MLX's default device is.
    """

    __slots__ = ("first", "format", "parts", "platform")

    def __init__(
        self,
        parts: Sequence[mx.array],
        format: Format,
        first: FirstKeys | None = None,
        platform: Platform | None = None,
    ):
        self.parts = tuple(parts)
        self.format = format
        self.first = first
        self.platform = platform

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the unpacked array."""
        codes = self.parts[0]
        return (*codes.shape[:-1], self.format.head_dim(codes.shape[-1]))

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the unpacked array."""
        return self.parts[1].dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.parts[0].ndim

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(part.nbytes for part in self.parts)

    def __getitem__(self, index: Any) -> "Packed":
        """Index the axes before the last; first keys are then as they are packed."""
        return Packed([part[index] for part in self.parts], self.format)

    def stored(self, dtype: mx.Dtype | None = None) -> mx.array:
        """The array in the basis in which it is stored, that is rotated if the format is."""
        dtype = dtype or self.dtype
        if self.parts[0].size == 0:  # a row of a batch without positions yet
            return mx.zeros(self.shape, dtype)
        array = self.format.unpack(self.parts, dtype)
        return array if self.first is None else self.first.added(array, self.first.residuals, 2)

    def plain(self, dtype: mx.Dtype | None = None) -> mx.array:
        """The unpacked array, up to rounding."""
        array = self.stored(dtype)
        return self.format.turn_back(array) if array.size else array
