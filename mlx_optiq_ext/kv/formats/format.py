"""The interface of every KV cache format."""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx


@dataclass(frozen=True)
class CodeLayout:
    """How codes lie in memory, for the kernels of our own.

    Attributes:
        dim: Head dimension.
        bits: Width of a code; codes follow each other without gaps, least significant bits first.
        group_size: Elements that share a scale and a bias; ``dim`` with a codebook.
        levels: Magnitude of each code without its sign bit, as a multiple of the vector's norm.
            Empty if a code is a multiple of its group's scale plus its bias.
    """

    dim: int
    bits: int
    group_size: int
    levels: tuple[float, ...] = ()


class Format(abc.ABC):
    """How keys or values are stored.

    A format is a frozen dataclass with a field ``bits``. It must implement six methods:
    `from_json`, `to_json`, `fitted`, `bits_per_element`, `pack` and `unpack`. With only these,
    attention unpacks one layer at a time. The others let faster kernels read the parts directly. So
    do the classes `Interleaving` and `Multiplying`, which can be inherited in place of this one.

    Attributes:
        name: ``"method"`` in kv_config.json.
        letters: Letter behind a width in a spec -> the JSON fields that it stands for. One from a
            to z, other than g, k and v.
        fields: Names of the JSON fields that `from_json` reads, besides ``"method"``.
        parts: What `pack` returns, in order, two or more. The first is uint32, the others have the
            dtype of the packed array. A cache holds the same part of keys and of values in one of
            mlx-lm's caches.
        packed_by_kernel: Whether the kernel that packs new keys and values may replace `pack`.
    """

    name: ClassVar[str]
    letters: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    fields: ClassVar[tuple[str, ...]] = ("bits",)
    parts: ClassVar[tuple[str, ...]]
    packed_by_kernel: ClassVar[bool] = False

    bits: int

    @classmethod
    @abc.abstractmethod
    def from_json(cls, fields: Mapping[str, Any], where: str) -> "Format":
        """Read the format of keys or of values.

        Args:
            fields: Those of `fields` that an entry of kv_config.json gives this side.
            where: The file and the entry, for messages.

        Raises:
            InputError: A field has a value that the format does not know.
        """

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The fields that `from_json` reads; ``"bits"`` first. The method is added to them."""

    @abc.abstractmethod
    def fitted(self, dim: int) -> "Format":
        """This format, adapted to a head dimension.

        Raises:
            UnsupportedError: Vectors of ``dim`` elements cannot be packed.
        """

    def for_keys(self) -> "Format":
        """What a width without a letter means for keys."""
        return self

    def for_values(self) -> "Format":
        """What a width without a letter means for values."""
        return self

    @property
    @abc.abstractmethod
    def bits_per_element(self) -> float:
        """Stored bits of an element, with its share of scales and the like in 16 bits."""

    @abc.abstractmethod
    def pack(self, array: mx.array) -> tuple[mx.array, ...]:
        """Pack (batch, heads, length, dim) into `parts`, each of its own last axis."""

    @abc.abstractmethod
    def unpack(self, parts: Sequence[mx.array], dtype: mx.Dtype) -> mx.array:
        """Undo `pack`, up to rounding and `turn`; never called on an empty array."""

    def turn(self, array: mx.array) -> mx.array:
        """Bring (..., dim) into the basis in which vectors are stored; it keeps inner products."""
        return array

    def turn_back(self, array: mx.array) -> mx.array:
        """Undo `turn`."""
        return array

    def turn_queries(self, array: mx.array) -> mx.array:
        """Bring queries (..., dim) where their products with turned keys are what they were."""
        return self.turn(array)

    def turn_sinks(self, sinks: mx.array) -> mx.array:
        """Logits (query heads,) that softmax gets besides the scores of turned keys."""
        return sinks

    def head_dim(self, words: int) -> int:
        """Head dimension of vectors whose first part is so many words wide."""
        return words * 32 // self.bits

    def widths(self, dim: int) -> tuple[int, ...]:
        """Last axis of each of `parts` for vectors of ``dim`` elements, without packing any."""
        return tuple(part.shape[-1] for part in self.pack(mx.zeros((1, 1, 1, dim))))

    def tile(self, parts: Sequence[mx.array]) -> mx.array:
        """`unpack` in float32, as fast as a CPU can."""
        return self.unpack(parts, mx.float32)

    def code_layout(self, dim: int) -> CodeLayout | None:
        """How the decoding kernels find codes, scales and biases; None if they cannot.

        They get the first three parts, or, with a codebook, the first two.
        """
        return None

    def __str__(self) -> str:
        return f"{self.bits} ({self.name})"


class Interleaving(Format):
    """A format whose parts of a vector may lie in one row, which costs a CPU fewer operations."""

    @abc.abstractmethod
    def join(self, parts: Sequence[mx.array]) -> mx.array:
        """All parts side by side in uint32 words (..., words)."""

    @abc.abstractmethod
    def split(self, words: mx.array, dtype: mx.Dtype) -> tuple[mx.array, ...]:
        """Undo `join` for an array of ``dtype``."""


class Multiplying(Format):
    """A format that MLX has a matrix product with, so that nothing need be unpacked."""

    @abc.abstractmethod
    def multiply(self, left: mx.array, parts: Sequence[mx.array], *, transpose: bool) -> mx.array:
        """``left @ array``, or ``left @ array.T``, in the stored basis; leading axes broadcast."""

    @abc.abstractmethod
    def product_rows(self, *, transpose: bool) -> int:
        """Most rows of ``left`` for which a CPU gains by `multiply` over `tile` and a product."""
