"""MLX's affine quantization, with or without a Hadamard rotation before it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import mlx.core as mx

from ...errors import InputError, UnsupportedError
from ...files import shown
from ...turboquant.hadamard import rotatable, rotate, rotate_back
from .affine_ranges import pack
from .format import CodeLayout, Interleaving, Multiplying

#: Bits and group sizes of MLX's affine quantization.
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
#: Group size of an entry of kv_config.json that names none.
GROUP_SIZE = 64
#: Queries of a key/value head up to which a quantized product is faster on a CPU, by bits: times
#: its keys, and times its values (measured in float32, tests/benchmarks/kv/attention.py).
KEY_ROWS = {2: 2, 3: 10, 4: 2, 5: 14, 6: 20, 8: 2}
VALUE_ROWS = {2: 3, 3: 10, 4: 6, 5: 14, 6: 20, 8: 5}


@dataclass(frozen=True)
class Affine(Interleaving, Multiplying):
    """Codes in groups that share a scale and a bias.

    Attributes:
        bits: Width of a code, one of `BITS`.
        group_size: Elements that share a scale and a bias, one of `GROUP_SIZES`; None for the
            largest of 64 and 32 that divides the head dimension.
        rotated: Whether a Hadamard rotation spreads outliers over the head dimension before
            quantization (QuaRot, Ashkboos et al., arXiv 2404.00456).
    """

    name: ClassVar[str] = "affine"
    letters: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {}, "r": {"rotated": True}}
    fields: ClassVar[tuple[str, ...]] = ("bits", "group_size", "rotated")
    parts: ClassVar[tuple[str, ...]] = ("codes", "scales", "biases")
    packed_by_kernel: ClassVar[bool] = True

    bits: int
    group_size: int | None = None
    rotated: bool = False

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], where: str) -> "Affine":
        """Read ``bits``, ``group_size`` (64) and ``rotated`` (false)."""
        bits, group = fields.get("bits"), fields.get("group_size", GROUP_SIZE)
        rotated = fields.get("rotated", False)
        if type(bits) is not int or bits not in BITS:
            raise InputError(f"{where}: bits {shown(bits)} is none of {', '.join(map(str, BITS))}")
        if group is not None and (type(group) is not int or group not in GROUP_SIZES):
            names = ", ".join(map(str, GROUP_SIZES))
            raise InputError(f"{where}: group_size {shown(group)} is none of {names}")
        if not isinstance(rotated, bool):
            raise InputError(f"{where}: rotated {shown(rotated)} is not true or false")
        return cls(bits, group, rotated)

    def to_json(self) -> dict[str, Any]:
        """The fields of kv_config.json: ``bits``, ``group_size`` and ``rotated``."""
        return {"bits": self.bits, "group_size": self.group_size, "rotated": self.rotated}

    @cache  # noqa: B019 - formats and dimensions are few
    def fitted(self, dim: int) -> "Affine":
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
        return self.bits + 32 / (self.group_size or GROUP_SIZE)

    def pack(self, array: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Pack (..., length, dim) into codes, scales and biases, each of its own last axis."""
        return pack(self.turn(array), self.bits, self.group_size or GROUP_SIZE)

    def unpack(self, parts: Sequence[mx.array], dtype: mx.Dtype) -> mx.array:
        """Undo `pack`, except for the rotation."""
        codes, scales, biases = parts
        return mx.dequantize(
            codes,
            scales.astype(dtype),
            biases.astype(dtype),
            group_size=self.group_size,
            bits=self.bits,
        )

    def turn(self, array: mx.array) -> mx.array:
        """Rotate (..., dim), if the format is rotated."""
        return rotate(array) if self.rotated else array

    def turn_back(self, array: mx.array) -> mx.array:
        """Undo `turn`."""
        return rotate_back(array) if self.rotated else array

    def join(self, parts: Sequence[mx.array]) -> mx.array:
        """Codes, scales and biases side by side, in uint32 words."""
        codes, *others = parts
        if others[0].dtype.size < 4:  # each alone may not fill whole words
            others = [mx.concatenate(others, axis=-1)]
        return mx.concatenate([codes, *(part.view(mx.uint32) for part in others)], axis=-1)

    def split(self, words: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array]:
        """Undo `join` for scales and biases of ``dtype``."""
        scale_words = dtype.size // 2  # of a scale and a bias
        group_words = (self.group_size or GROUP_SIZE) * self.bits // 32
        groups = words.shape[-1] // (group_words + scale_words)
        width = words.shape[-1] - groups * scale_words
        rest = words[..., width:].view(dtype)
        return words[..., :width], rest[..., :groups], rest[..., groups:]

    def tile(self, parts: Sequence[mx.array]) -> mx.array:
        """The same as ``mx.dequantize`` in float32, in a third of the time on a CPU."""
        if 32 % self.bits:
            return self.unpack(parts, mx.float32)
        codes, scales, biases = parts
        codes = mx.unflatten(codes, -1, (scales.shape[-1], -1))
        return _whole_codes(self.bits)(codes, scales[..., None], biases[..., None]).flatten(-3)

    def multiply(self, left: mx.array, parts: Sequence[mx.array], *, transpose: bool) -> mx.array:
        """MLX's quantized product."""
        codes, scales, biases = parts
        return mx.quantized_matmul(
            left,
            codes,
            scales,
            biases,
            transpose=transpose,
            group_size=self.group_size,
            bits=self.bits,
        )

    def product_rows(self, *, transpose: bool) -> int:
        """The limit measured for keys (with ``transpose``) or values."""
        return (KEY_ROWS if transpose else VALUE_ROWS)[self.bits]

    def code_layout(self, dim: int) -> CodeLayout:
        """Codes in groups with a scale and a bias."""
        return CodeLayout(dim, self.bits, self.group_size or GROUP_SIZE)

    def __str__(self) -> str:
        size = f"g{self.group_size}" if self.group_size else ""
        return f"{self.bits}{size}{'r' if self.rotated else ''}"


def candidates(dims: Collection[int], *, rotation: bool = True) -> list[Affine]:
    """Every affine format that fits all of these head dimensions.

    Args:
        dims: Head dimensions.
        rotation: Whether to include rotated formats, where all dimensions have a rotation.
    """
    rotations = (False, True) if rotation and all(map(rotatable, dims)) else (False,)
    return [
        Affine(bits, size, rotated)
        for bits in BITS
        for size in GROUP_SIZES
        if all(dim and dim % size == 0 for dim in dims)
        for rotated in rotations
    ]


@cache
def _whole_codes(bits: int) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
    """Words (..., groups, words) and (..., groups, 1) to (..., groups, words, codes of a word)."""

    def unpacked(words: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        places = bits * mx.arange(32 // bits, dtype=mx.uint32)
        codes = mx.right_shift(words[..., None], places) & (2**bits - 1)
        scales, biases = (each[..., None].astype(mx.float32) for each in (scales, biases))
        return codes.astype(mx.float32) * scales + biases

    return mx.compile(unpacked, shapeless=True)
