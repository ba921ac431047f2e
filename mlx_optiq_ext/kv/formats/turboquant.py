"""TurboQuant: a random rotation, codes of a codebook and a norm for each vector."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import mlx.core as mx

from ...errors import InputError, UnsupportedError
from ...files import shown
from ...turboquant import BITS, Encoded, Quantizer, Rotation, levels
from .format import CodeLayout, Format


@dataclass(frozen=True)
class TurboQuant(Format):
    """Codes and a norm for each vector (Zandieh et al., arXiv 2504.19874).

    Attributes:
        bits: Width of a code, 1 to 4.
        seed: Seed of the rotation.
        dim: Head dimension; None until it is known.
    """

    name: ClassVar[str] = "turboquant"
    letters: ClassVar[Mapping[str, Mapping[str, Any]]] = {"t": {}}
    fields: ClassVar[tuple[str, ...]] = ("bits", "seed")
    parts: ClassVar[tuple[str, ...]] = ("codes", "norms")

    bits: int
    seed: int = 0
    dim: int | None = None

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], where: str) -> "TurboQuant":
        """Read ``bits`` and ``seed`` (0)."""
        bits, seed = fields.get("bits"), fields.get("seed", 0)
        if type(bits) is not int or bits not in BITS:
            names = ", ".join(map(str, BITS))
            raise InputError(f"{where}: TurboQuant bits {shown(bits)} is none of {names}")
        if type(seed) is not int or not 0 <= seed < 1 << 63:
            raise InputError(f"{where}: seed {shown(seed)} is not a number from 0 on")
        return cls(bits, seed)

    def to_json(self) -> dict[str, Any]:
        """The fields of kv_config.json: ``bits`` and ``seed``."""
        return {"bits": self.bits, "seed": self.seed}

    @cache  # noqa: B019 - formats and dimensions are few
    def fitted(self, dim: int) -> "TurboQuant":
        """This format for vectors of ``dim`` elements.

        Raises:
            UnsupportedError: ``dim`` is no multiple of 32.
        """
        if dim % 32 or dim == 0:
            raise UnsupportedError(
                f"keys or values of width {dim} are no multiple of 32, which TurboQuant packs: "
                "leave this layer out of the KV plan"
            )
        return replace(self, dim=dim)

    @property
    def bits_per_element(self) -> float:
        """Stored bits of an element, with its share of a 16-bit norm."""
        return self.bits + 16 / (self.dim or 128)

    def pack(self, array: mx.array) -> tuple[mx.array, mx.array]:
        """Pack (..., dim) into codes and norms, each of its own last axis."""
        found = Quantizer(array.shape[-1], self.bits, self.seed).encode(array)
        return found.codes, found.norms

    def unpack(self, parts: Sequence[mx.array], dtype: mx.Dtype) -> mx.array:
        """Undo `pack`, in the rotated basis."""
        codes, norms = parts
        quantizer = Quantizer(self.head_dim(codes.shape[-1]), self.bits, self.seed)
        return quantizer.rotated(Encoded(codes, norms), dtype)

    def turn(self, array: mx.array) -> mx.array:
        """Rotate (..., dim) into the basis of packed vectors."""
        return Rotation(array.shape[-1], self.seed)(array)

    def turn_back(self, array: mx.array) -> mx.array:
        """Undo `turn`."""
        return Rotation(array.shape[-1], self.seed).back(array)

    def widths(self, dim: int) -> tuple[int, int]:
        """Codes and a norm."""
        return dim * self.bits // 32, 1

    def code_layout(self, dim: int) -> CodeLayout:
        """One group for each vector, with a codebook."""
        return CodeLayout(dim, self.bits, dim, levels(dim, self.bits))

    def __str__(self) -> str:
        return f"{self.bits}t"
