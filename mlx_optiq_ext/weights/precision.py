"""Precisions: how MLX can store a weight, and the bits that this takes."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..errors import InputError


@dataclass(frozen=True)
class Mode:
    """One of MLX's quantization modes.

    Attributes:
        bits: Its bit widths.
        group_sizes: Its group sizes.
        scale_bits: Bits of a scale; None for those of the weight's dtype.
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
#: Bits and group sizes that a plan chooses from.
BITS, GROUP_SIZES = MODES[AFFINE].bits, MODES[AFFINE].group_sizes
#: Elements of a weight that are quantized or compared at once.
ELEMENTS = 1 << 23


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
            settings: ``mode``, ``bits`` and ``group_size``; MLX's defaults for missing ones.

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
        """The precision in the form of mlx-lm's config and ``quant_predicate``.

        The mode is left out if it is affine: this is the default everywhere, and some layers of
        mlx-lm do not take a mode.
        """
        settings: dict[str, Any] = {"group_size": self.group_size, "bits": self.bits}
        return settings if self.mode == AFFINE else {**settings, "mode": self.mode}

    @property
    def exists(self) -> bool:
        """Whether MLX supports these bits and this group size in this mode."""
        mode = MODES[self.mode]
        return self.bits in mode.bits and self.group_size in mode.group_sizes

    @property
    def quantized(self) -> bool:
        """Whether the weight is quantized."""
        return self.group_size > 0

    def stored_bits(self, shape: tuple[int, ...], dtype_bits: int) -> int:
        """Bits in the file: elements, scales and biases.

        Args:
            shape: The unquantized shape, quantized along the last axis.
            dtype_bits: Bits of the weight's dtype.
        """
        size = math.prod(shape)
        if not self.quantized:
            return size * self.bits
        mode = MODES[self.mode]
        group = (mode.scale_bits or dtype_bits) * (2 if mode.biased else 1)
        return size * self.bits + size // self.group_size * group

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether MLX can quantize a weight of this shape."""
        # MLX reads 32 elements at a time, whatever the group size.
        unit = math.lcm(self.group_size, 32)
        return not self.quantized or (len(shape) >= 2 and shape[-1] % unit == 0)

    def __str__(self) -> str:
        if self.quantized and self.mode != AFFINE:
            return self.mode  # a mode with one width and one group size
        return f"{self.bits}-bit g{self.group_size}" if self.quantized else f"{self.bits}-bit"


def quantize(weight: mx.array, precision: Precision) -> tuple[mx.array, ...]:
    """MLX's own quantization of a weight ``(..., out, in)``.

    Returns:
        ``(words, scales, biases)`` with codes in uint32 ``words (..., out, in * bits / 32)``, and
        scales and biases (..., out, in / group_size); a mode without biases leaves them out.
    """
    return tuple(mx.quantize(weight, **_arguments(precision)))


def dequantized(weight: mx.array, precision: Precision, dtype: mx.Dtype) -> mx.array:
    """A weight ``(..., out, in)`` quantized and dequantized again, computed in ``dtype``.

    Affine scales and biases are rounded to the weight's own dtype first, as in the file.
    """
    if not precision.quantized:
        return weight.astype(dtype)
    made = lambda at: dequantize(quantize(weight[at], precision), precision, dtype)  # noqa: E731
    return assembled(weight.shape, dtype, made)


def dequantize(quantized: tuple[mx.array, ...], precision: Precision, dtype: mx.Dtype) -> mx.array:
    """The weight (..., out, in) of some words, scales and biases, computed in ``dtype``."""
    words, scales, *biases = quantized
    if biases:
        scales, biases = scales.astype(dtype), [biases[0].astype(dtype)]
    bias = biases[0] if biases else None
    return mx.dequantize(words, scales, bias, **_arguments(precision)).astype(dtype)


def pieces(weight: mx.array) -> Iterator[tuple[slice, mx.array]]:
    """A weight ``(..., out, in)`` some rows or experts at a time, with where they are."""
    slices = _slices(weight.shape)
    for at in slices:
        yield at, weight if len(slices) == 1 else weight[at]


def assembled(
    shape: tuple[int, ...], dtype: mx.Dtype, made: Callable[[slice], mx.array]
) -> mx.array:
    """An array of some rows or experts at a time, as what makes them takes memory of its own.

    Args:
        shape: Of the whole.
        dtype: Of the whole.
        made: Makes the rows or experts at a slice.
    """
    slices = _slices(shape)
    if len(slices) == 1:
        return made(slice(None))
    whole = mx.zeros(shape, dtype)
    for at in slices:
        whole[at] = made(at)
        mx.eval(whole)  # in place
    return whole


def _slices(shape: tuple[int, ...]) -> list[slice]:
    step = max(1, ELEMENTS * shape[0] // max(math.prod(shape), 1))
    return [slice(start, start + step) for start in range(0, shape[0], step)]


def _arguments(precision: Precision) -> dict[str, Any]:
    return {**precision.settings, "mode": precision.mode}
