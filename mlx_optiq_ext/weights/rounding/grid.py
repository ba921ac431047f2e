"""How codes, scales and biases are stored, and a weight rounded to them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

#: Shares of a group's range that the search for its scale starts from.
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
#: A scale that is as good as none.
TINY = 1e-7


@dataclass(frozen=True)
class Format:
    """How codes and scales are stored.

    Attributes:
        bits: Code width.
        group_size: Columns that share a scale and a bias.
        dtype: Of scales and biases.
    """

    bits: int
    group_size: int
    dtype: mx.Dtype

    @property
    def top(self) -> float:
        """The largest code."""
        return float(2**self.bits - 1)

    @property
    def ranges(self) -> tuple[float, ...]:
        """Where the search for scales starts; fine codes gain nothing from narrow ranges."""
        return RANGES if self.bits < 6 else RANGES[:3]

    def stored(self, values: np.ndarray) -> np.ndarray:
        """Values as they come back from ``dtype``, in float32."""
        if self.dtype == mx.float16:
            return values.astype(np.float16).astype(np.float32)
        if self.dtype == mx.bfloat16:
            bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
            return rounded.view(np.float32)
        return values.astype(np.float32)


class Rounded(NamedTuple):
    """Rounded rows, with columns and groups in the order of rounding.

    Attributes:
        codes: (batch, rows, in) uint8.
        scales: (batch, rows, groups) float32, exact in the storage dtype.
        biases: (batch, rows, groups) float32, exact too.
        error: The target minus what these stand for, (batch, rows, in).
    """

    codes: Any
    scales: Any
    biases: Any
    error: Any
