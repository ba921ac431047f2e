"""How a KV cache stores a layer's keys or values with TurboQuant."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import mlx.core as mx

from ..errors import UnsupportedError
from .codebook import levels
from .quantizer import Encoded, Quantizer
from .rotation import Rotation


@dataclass(frozen=True)
class TurboFormat:
    """In the place of `mlx_optiq_ext.kv.Format`: codes and a norm for each vector.

    Attributes:
        bits: Of a code, 1 to 4.
        seed: Of the rotation.
        group_size: Elements that share a norm: a whole vector; None until its dimension is known.
    """

    bits: int
    seed: int = 0
    group_size: int | None = None

    @cache  # noqa: B019 - formats and dimensions are few
    def fitted(self, dim: int) -> "TurboFormat":
        """The same for vectors of ``dim``.

        Raises:
            UnsupportedError: ``dim`` is no multiple of 32.
        """
        if dim % 32 or dim == 0:
            raise UnsupportedError(
                f"keys or values of width {dim} are no multiple of 32, which TurboQuant packs: "
                "leave this layer out of the KV plan"
            )
        return replace(self, group_size=dim)

    @property
    def bits_per_element(self) -> float:
        """Stored bits of an element, with its share of a 16-bit norm."""
        return self.bits + 16 / (self.group_size or 128)

    def pack(self, array: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Pack (..., dim) into codes, norms and an array of no width, each (..., its own width)."""
        found = Quantizer(array.shape[-1], self.bits, self.seed).encode(array)
        return found.codes, found.norms, found.norms[..., :0]

    def unpack(self, parts: Sequence[mx.array], dtype: mx.Dtype) -> mx.array:
        """Undo `pack`, in the rotated basis."""
        dim = parts[0].shape[-1] * 32 // self.bits
        return Quantizer(dim, self.bits, self.seed).rotated(Encoded(parts[0], parts[1]), dtype)

    def turn(self, array: mx.array) -> mx.array:
        """Rotate (..., dim) as packed vectors are."""
        return Rotation(array.shape[-1], self.seed)(array)

    def turn_back(self, array: mx.array) -> mx.array:
        """Undo `turn`."""
        return Rotation(array.shape[-1], self.seed).back(array)

    def levels(self, dim: int) -> tuple[float, ...]:
        """Magnitudes that a code without its sign bit stands for, times the norm."""
        return levels(dim, self.bits)

    def __str__(self) -> str:
        return f"{self.bits}t"
