"""Keys or values in packed form, along the head dimension."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from ..kernels import Platform
from .formats import Format
from .kept.first_keys import FirstKeys
from .kept.recent import Recent


class Stack(NamedTuple):
    """Keys and values of equal formats in two arrays: the heads of the values lie behind the keys'.

    Attributes:
        codes: Of both, (batch, 2 x heads, length, words).
        words: Scales of a position and then its biases, in 32-bit words.
        dtype: Of scales and biases.
    """

    codes: mx.array
    words: mx.array
    dtype: mx.Dtype

    def parts(self, side: int) -> tuple[mx.array, mx.array, mx.array]:
        """Codes, scales and biases of the keys (0) or the values (1)."""
        heads = self.codes.shape[1] // 2
        own = slice(side * heads, (side + 1) * heads)
        scales, biases = mx.split(self.words[:, own].view(self.dtype), 2, axis=-1)
        return self.codes[:, own], scales, biases


class Packed:
    """An array of keys or values (batch, heads, length, dim) in packed form.

    Attributes:
        stack: The arrays that hold both keys and values, if they lie in one stack.
        format: The format, fitted to the head dimension.
        first: What the first keys differ by from what is packed; None for nothing.
        platform: Where attention reads it; None for where MLX's default device is.
        recent: The last tokens as they were computed; None for nothing.
    """

    __slots__ = ("_parts", "_side", "first", "format", "platform", "recent", "stack")

    def __init__(
        self,
        parts: Sequence[mx.array],
        format: Format,
        first: FirstKeys | None = None,
        platform: Platform | None = None,
    ):
        self._parts = tuple(parts)
        self.format = format
        self.first = first
        self.platform = platform
        self.stack: Stack | None = None
        self.recent: Recent | None = None
        self._side = 0

    @classmethod
    def of_stack(
        cls,
        stack: Stack,
        side: int,
        format: Format,
        first: FirstKeys | None = None,
        platform: Platform | None = None,
    ) -> "Packed":
        """The keys (0) or the values (1) of a stack."""
        found = cls((), format, first, platform)
        found.stack, found._side = stack, side
        return found

    @property
    def parts(self) -> tuple[mx.array, ...]:
        """Parts that the format packs into; those of a stack are cut out of it."""
        return self._parts if self.stack is None else self.stack.parts(self._side)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the unpacked array."""
        if self.stack is None:
            *sizes, words = self.parts[0].shape
        else:
            rows, heads, tokens, words = self.stack.codes.shape
            sizes = [rows, heads // 2, tokens]
        return (*sizes, self.format.head_dim(words))

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the unpacked array."""
        return self.parts[1].dtype if self.stack is None else self.stack.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

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
