"""Precisions: how MLX can store a weight, and the bits that it then takes."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import InputError
from ..model.layers import leaves, quantizable


@dataclass(frozen=True)
class Mode:
    """One of MLX's quantization modes.

    Attributes:
        bits: The widths that it has.
        group_sizes: The group sizes that it has.
        scale_bits: Width of a scale; None for that of the weight's own dtype.
        biased: Whether a group has a bias, as wide as its scale.
    """

    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    scale_bits: int | None = None
    biased: bool = False


AFFINE = "affine"
#: MLX's modes by name, see ``mx.quantize``.
MODES: Mapping[str, Mode] = {
    AFFINE: Mode((2, 3, 4, 5, 6, 8), (32, 64, 128), biased=True),
    "mxfp4": Mode((4,), (32,), scale_bits=8),
    "mxfp8": Mode((8,), (32,), scale_bits=8),
    "nvfp4": Mode((4,), (16,), scale_bits=8),
}
#: What a plan chooses from.
BITS, GROUP_SIZES = MODES[AFFINE].bits, MODES[AFFINE].group_sizes


@dataclass(frozen=True, order=True)
class Precision:
    """One way to store a weight.

    Attributes:
        bits: Bits of one quantized element; for an unquantized weight those of its dtype.
        group_size: Elements that share a scale; 0 for an unquantized weight.
        mode: Name of one of `MODES`.

    Raises:
        InputError: The mode is unknown.
    """

    bits: int
    group_size: int
    mode: str = AFFINE

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(
                f"{self.mode!r} is not a quantization mode of MLX: give {', '.join(MODES)}"
            )

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Precision":
        """The precision that a config or a ``quant_predicate`` of mlx-lm asks for.

        Args:
            settings: With ``mode``, ``bits`` and ``group_size``; MLX's defaults for what it lacks.

        Raises:
            InputError: The mode is unknown.
        """
        mode = settings.get("mode", AFFINE)
        bits, group_size = 4, 64
        if mode != AFFINE and mode in MODES:
            (bits,), (group_size,) = MODES[mode].bits, MODES[mode].group_sizes
        return cls(settings.get("bits", bits), settings.get("group_size", group_size), mode)

    @property
    def settings(self) -> dict[str, Any]:
        """The precision as mlx-lm's config and ``quant_predicate`` have it.

        The mode is left out where it is affine: that is the default everywhere, and some layers of
        mlx-lm know no other.
        """
        settings: dict[str, Any] = {"group_size": self.group_size, "bits": self.bits}
        return settings if self.mode == AFFINE else {**settings, "mode": self.mode}

    @property
    def exists(self) -> bool:
        """Whether MLX has this width and group size in this mode."""
        mode = MODES[self.mode]
        return self.bits in mode.bits and self.group_size in mode.group_sizes

    @property
    def quantized(self) -> bool:
        """Whether the weight is quantized at all."""
        return self.group_size > 0

    def stored_bits(self, shape: tuple[int, ...], dtype_bits: int) -> int:
        """Bits in the file: elements, scales and biases.

        Args:
            shape: The unquantized shape, quantized along the last axis.
            dtype_bits: Width of the weight's dtype.
        """
        size = math.prod(shape)
        if not self.quantized:
            return size * self.bits
        mode = MODES[self.mode]
        group = (mode.scale_bits or dtype_bits) * (2 if mode.biased else 1)
        return size * self.bits + size // self.group_size * group

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether MLX can pack a weight of this shape."""
        # MLX reads 32 elements at a time, whatever the group size.
        unit = math.lcm(self.group_size, 32)
        return not self.quantized or (len(shape) >= 2 and shape[-1] % unit == 0)

    def __str__(self) -> str:
        if self.quantized and self.mode != AFFINE:
            return self.mode  # which has one width and one group size
        return f"{self.bits}-bit g{self.group_size}" if self.quantized else f"{self.bits}-bit"


@dataclass(frozen=True)
class Tensor:
    """A weight that can be quantized.

    Attributes:
        path: Layer path of its module, such as ``model.layers.0.self_attn.q_proj``.
        shape: Unpacked shape ``(..., out, in)``.
        dtype_bits: Width of its dtype.
        precisions: The candidates, by rising stored bits.
        own: What the model's own ``quant_predicate`` asks for, if it does; the least that honours
            it where its group size does not divide the last axis.
    """

    path: str
    shape: tuple[int, ...]
    dtype_bits: int
    precisions: tuple[Precision, ...]
    own: Precision | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def stored_bits(self, precision: Precision) -> int:
        """Bits in the file under one precision."""
        return precision.stored_bits(self.shape, self.dtype_bits)

    @property
    def unquantized(self) -> Precision:
        """The weight as it is."""
        return Precision(self.dtype_bits, 0)


def quantize(weight: mx.array, precision: Precision) -> tuple[mx.array, ...]:
    """MLX's own quantization of a weight ``(..., out, in)``.

    Returns:
        ``(words, scales, biases)`` with codes in uint32 ``words (..., out, in * bits / 32)``, and
        scales and biases (..., out, in / group_size); a mode without biases leaves them out.
    """
    return tuple(mx.quantize(weight, **_arguments(precision)))


def dequantized(weight: mx.array, precision: Precision, dtype: mx.Dtype) -> mx.array:
    """What a weight ``(..., out, in)`` becomes under a precision, computed in ``dtype``.

    Affine scales and biases are rounded to the weight's own dtype first, as in the file.
    """
    if not precision.quantized:
        return weight.astype(dtype)
    words, scales, *biases = quantize(weight, precision)
    if biases:
        scales, biases = scales.astype(dtype), [biases[0].astype(dtype)]
    bias = biases[0] if biases else None
    return mx.dequantize(words, scales, bias, **_arguments(precision)).astype(dtype)


def _arguments(precision: Precision) -> dict[str, Any]:
    return {**precision.settings, "mode": precision.mode}


def tensors(
    model: nn.Module,
    bits: Iterable[int] = BITS,
    group_sizes: Iterable[int] = GROUP_SIZES,
    *,
    allow_unquantized: bool = False,
) -> list[Tensor]:
    """The quantizable weights of a model with their candidate precisions.

    The model's own ``quant_predicate`` is a floor: what it refuses is left alone, and where it asks
    for certain bits and group size (routers, gates) nothing coarser is a candidate.

    Args:
        model: An mlx-lm model; nothing is evaluated.
        bits: Widths to consider.
        group_sizes: Group sizes to consider.
        allow_unquantized: Whether leaving a weight unquantized is a candidate too.
    """
    predicate: Callable[[str, Any], bool | dict] | None = getattr(model, "quant_predicate", None)
    grid = [Precision(b, g) for b in sorted(set(bits)) for g in sorted(set(group_sizes))]
    result = []
    for path, module in quantizable(model):
        shape, dtype_bits = tuple(module.weight.shape), module.weight.dtype.size * 8
        own = True if predicate is None else predicate(path, module)
        if own is False:
            continue
        options, floor = [p for p in grid if p.fits(shape)], None
        if isinstance(own, dict):
            floor = Precision.of(own)
            options = [
                p for p in options if p.bits >= floor.bits and p.group_size <= floor.group_size
            ] or [p for p in (floor,) if p.fits(shape)]
        if not options:
            continue
        if allow_unquantized:
            options.append(Precision(dtype_bits, 0))
        options.sort(key=lambda p: (p.stored_bits(shape, dtype_bits), -p.bits))
        if floor is not None and not floor.fits(shape):
            floor = options[0]
        result.append(Tensor(path, shape, dtype_bits, tuple(options), floor))
    return result


@dataclass(frozen=True)
class Size:
    """What mlx-lm counts when it prints bits per weight.

    Attributes:
        parameters: Number of parameters that mlx-lm divides by, those of leaf modules.
        fixed_bits: Stored bits of everything that is not a candidate.
    """

    parameters: int
    fixed_bits: int

    @classmethod
    def of(cls, model: nn.Module, candidates: Iterable[Tensor]) -> "Size":
        """Count a model. Nothing is evaluated."""
        # mlx-lm divides by the parameters of leaf modules only: not by those that a block holds
        # itself, such as a router's bias.
        own = [leaf.parameters() for _, leaf in leaves(model)]
        parameters = sum(array.size for _, array in _arrays(own))
        # mlx-lm counts the bytes of every array in the module tree, private ones included.
        total = reduce(lambda n, entry: n + entry[1].nbytes * 8, _arrays(model), 0)
        return cls(parameters, total - sum(t.size * t.dtype_bits for t in candidates))

    def bits_per_weight(self, stored_bits: int) -> float:
        """Bits per weight when the candidates take ``stored_bits``."""
        return (self.fixed_bits + stored_bits) / self.parameters

    def room(self, bits_per_weight: float) -> int:
        """Stored bits left for the candidates under a budget; may be negative."""
        return math.floor(bits_per_weight * self.parameters) - self.fixed_bits


def _arrays(tree: Any) -> list[tuple[str, mx.array]]:
    entries = tree_flatten(tree)
    assert isinstance(entries, list)
    return [(path, value) for path, value in entries if isinstance(value, mx.array)]
