"""MLX's affine quantization, with or without a linear map before it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar

import mlx.core as mx

from ...errors import InputError, UnsupportedError
from ...files import shown
from ...turboquant.hadamard import rotatable, rotate, rotate_back
from .affine_ranges import pack
from .compilation import compiled
from .format import CodeLayout, Interleaving, Multiplying
from .key_transform import KeyTransform

#: Bits and group sizes of MLX's affine quantization.
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
#: Bits from which on keys need no transform, and values no rotation.
FINE = 6
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
            quantization (QuaRot, Ashkboos et al., arXiv 2404.00456). None where it can, until the
            format is fitted.
        transformed: Whether keys are transformed before that, in place of a rotation.
        transform: How. None until the layer's is known: it is read beside a plan or fitted.
    """

    name: ClassVar[str] = "affine"
    letters: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {},
        "p": {},
        "r": {"rotated": True},
        "x": {"transformed": True},
    }
    fields: ClassVar[tuple[str, ...]] = ("bits", "group_size", "rotated", "transformed")
    parts: ClassVar[tuple[str, ...]] = ("codes", "scales", "biases")
    packed_by_kernel: ClassVar[bool] = True

    bits: int
    group_size: int | None = None
    rotated: bool | None = False
    transformed: bool = False
    transform: KeyTransform | None = field(default=None)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], where: str) -> "Affine":
        """Read ``bits``, ``group_size`` (64), ``rotated`` and ``transformed`` (false)."""
        bits, group = fields.get("bits"), fields.get("group_size", GROUP_SIZE)
        flags = {name: fields.get(name, False) for name in ("rotated", "transformed")}
        if type(bits) is not int or bits not in BITS:
            raise InputError(f"{where}: bits {shown(bits)} is none of {', '.join(map(str, BITS))}")
        if group is not None and (type(group) is not int or group not in GROUP_SIZES):
            names = ", ".join(map(str, GROUP_SIZES))
            raise InputError(f"{where}: group_size {shown(group)} is none of {names}")
        for name, value in flags.items():
            # A saved layer that was never written may leave the rotation open.
            if not isinstance(value, bool) and not (name == "rotated" and value is None):
                raise InputError(f"{where}: {name} {shown(value)} is not true or false")
        if all(flags.values()):
            raise InputError(f"{where}: rotated and transformed exclude each other: leave one out")
        return cls(bits, group, **flags)

    def to_json(self) -> dict[str, Any]:
        """The fields of kv_config.json: ``bits``, ``group_size``, ``rotated``, ``transformed``."""
        found = {"bits": self.bits, "group_size": self.group_size, "rotated": self.rotated}
        return found | ({"transformed": True} if self.transformed else {})

    def for_keys(self) -> "Affine":
        """Transformed, unless so fine that little is gained."""
        return replace(self, transformed=True) if self.bits < FINE else self

    def for_values(self) -> "Affine":
        """Rotated where the dimension has a rotation, unless so fine that little is gained."""
        return replace(self, rotated=None) if self.bits < FINE else self

    def with_transform(self, transform: KeyTransform) -> "Affine":
        """These codes behind a transform of keys, spread over groups of this format's size."""
        size = self.fitted(transform.dim).group_size or GROUP_SIZE
        return replace(self, transform=replace(transform, group_size=size))

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
        rotated = rotatable(dim) if self.rotated is None else self.rotated
        return replace(self, group_size=fitting[0], rotated=rotated)

    def in_groups(self, size: int) -> "Affine":
        """The same in groups of another size."""
        found = replace(self, group_size=size)
        return found if self.transform is None else found.with_transform(self.transform)

    @property
    def bits_per_element(self) -> float:
        """Stored bits of an element, with its share of a 16-bit scale and bias."""
        return self.bits + 32 / (self.group_size or GROUP_SIZE)

    def pack(self, array: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Pack (..., length, dim) into codes, scales and biases, each of its own last axis."""
        size = self.group_size or GROUP_SIZE
        return pack(self.turn(array), self.bits, size)

    def unpack(self, parts: Sequence[mx.array], dtype: mx.Dtype) -> mx.array:
        """Undo `pack`, except for the rotation or transform."""
        codes, scales, biases = parts
        return mx.dequantize(
            codes,
            scales.astype(dtype),
            biases.astype(dtype),
            group_size=self.group_size,
            bits=self.bits,
        )

    def turn(self, array: mx.array) -> mx.array:
        """Rotate (..., dim) or transform keys, if the format does."""
        if self.transformed:
            return self._transform.apply(array)
        return rotate(array) if self.rotated else array

    def turn_back(self, array: mx.array) -> mx.array:
        """Undo `turn`."""
        if self.transformed:
            return self._transform.undo(array)
        return rotate_back(array) if self.rotated else array

    def turn_queries(self, array: mx.array) -> mx.array:
        """Rotate queries as keys, or undo on them what the transform does to keys."""
        return self._transform.queries(array) if self.transformed else self.turn(array)

    def turn_sinks(self, sinks: mx.array) -> mx.array:
        """The logits as they are; centred keys would need others for each query.

        Raises:
            UnsupportedError: Keys are centred.
        """
        if self.transformed and self._transform.centred:
            raise UnsupportedError(
                "keys were centred for a model without attention sinks: plan this model anew"
            )
        return sinks

    @property
    def _transform(self) -> KeyTransform:
        if self.transform is None:
            raise UnsupportedError(
                f"{self}: the transform of a layer's keys is not known: mount the plan on a model"
            )
        return self.transform

    def widths(self, dim: int) -> tuple[int, int, int]:
        """Codes, and a scale and a bias for each group."""
        groups = dim // (self.group_size or GROUP_SIZE)
        return dim * self.bits // 32, groups, groups

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
        return f"{self.bits}{size}{'r' if self.rotated else 'x' if self.transformed else ''}"


def candidates(
    dims: Collection[int], *, rotation: bool = True, transform: KeyTransform | None = None
) -> list[Affine]:
    """Every affine format that fits all of these head dimensions.

    Args:
        dims: Head dimensions.
        rotation: Whether to include rotated formats, where all dimensions have a rotation.
        transform: Of keys, which then are transformed in place of rotated.
    """
    sizes = [size for size in GROUP_SIZES if all(dim and dim % size == 0 for dim in dims)]
    found = [Affine(bits, size) for bits in BITS for size in sizes]
    if transform is not None:
        return found + [replace(f, transformed=True).with_transform(transform) for f in found]
    if rotation and all(map(rotatable, dims)):
        found += [replace(f, rotated=True) for f in found]
    return found


@cache
def _whole_codes(bits: int) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
    """Words (..., groups, words) and (..., groups, 1) to (..., groups, words, codes of a word)."""

    def unpacked(words: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        places = bits * mx.arange(32 // bits, dtype=mx.uint32)
        codes = mx.right_shift(words[..., None], places) & (2**bits - 1)
        scales, biases = (each[..., None].astype(mx.float32) for each in (scales, biases))
        return codes.astype(mx.float32) * scales + biases

    return compiled(unpacked)
