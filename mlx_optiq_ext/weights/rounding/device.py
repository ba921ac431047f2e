"""The steps of rounding on a GPU: a kernel for a group of columns, MLX's products for the rest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...kernels import PLACES, TYPES, header, name_of, text
from .grid import Format, Group

FEEDBACK = (
    ("weight", "shift", "share", "coupling", "limits"),
    ("codes", "scales", "biases", "error"),
)
SWEEP = (
    ("slope", "codes", "scales", "biases", "moment", "limits"),
    ("new_codes", "new_scales", "new_biases", "change"),
)
#: Lanes of a row.
LANES = 32


@dataclass(frozen=True)
class Split:
    """A matrix as a sum of two that a GPU multiplies with exactly.

    GPUs may round the factors of a product to 11 bits (TF32). A part of 8 bits and the rest keep
    19 of them, which the differences of large numbers here need.
    """

    high: mx.array
    low: mx.array

    @classmethod
    def of(cls, values: mx.array) -> "Split":
        """Split float32 values."""
        high = values.astype(mx.bfloat16).astype(mx.float32)
        return cls(high, values - high)

    def __getitem__(self, at: Any) -> "Split":
        return Split(self.high[at], self.low[at])

    def swapaxes(self, first: int, second: int) -> "Split":
        """With two axes in each other's place."""
        return Split(self.high.swapaxes(first, second), self.low.swapaxes(first, second))


@dataclass(frozen=True, eq=False)
class Device:
    """Arrays (batch, rows, columns) in float32 on a GPU.

    Attributes:
        platform: ``"metal"`` or ``"cuda"``.
        compile: ``mx.fast.metal_kernel`` or ``mx.fast.cuda_kernel``.
    """

    platform: str
    compile: Callable[..., Any]

    def array(self, values: Any) -> mx.array:
        """Values in float32."""
        return mx.array(values).astype(mx.float32)

    def factor(self, values: mx.array) -> Split:
        """What a product takes as its right factor."""
        return Split.of(values)

    def product(self, left: mx.array, right: Split) -> mx.array:
        """``left @ right`` to about 19 bits."""
        own = Split.of(left)
        return own.high @ right.high + (own.high @ right.low + own.low @ right.high)

    def concatenate(self, parts: Sequence[mx.array], axis: int = -1) -> mx.array:
        """Parts side by side."""
        return mx.concatenate(list(parts), axis=axis)

    def take(self, values: mx.array, at: np.ndarray, axis: int) -> mx.array:
        """Elements along an axis; ``at`` is (count,), or (batch, count) for the last axis."""
        if at.ndim == 1:
            return mx.take(values, mx.array(at), axis=axis)
        return mx.take_along_axis(values, mx.array(at)[:, None], axis=-1)

    def choose(self, condition: mx.array, new: mx.array, old: mx.array) -> mx.array:
        """One array where a condition holds, else another."""
        return mx.where(condition, new, old)

    def start(self, *arrays: mx.array) -> None:
        """Begin to compute, while the next steps are put together."""
        mx.async_eval(*arrays)

    def feedback(
        self,
        weight: mx.array,
        shift: mx.array | None,
        share: mx.array,
        coupling: mx.array,
        form: Format,
    ) -> tuple[Group, mx.array]:
        """Round one group column by column; see `steps.Steps`."""
        shift = mx.broadcast_to(mx.array(0.0), weight.shape) if shift is None else shift
        call = _kernel(self, "feedback", FEEDBACK, form.group_size, str(form.dtype))
        codes, scales, biases, error = call(
            inputs=[weight, shift, share, coupling, _limits(form)],
            **_launch(weight.shape, form.group_size),
        )
        return Group(codes, scales, biases), error

    def sweep(
        self, slope: mx.array, group: Group, moment: mx.array, form: Format
    ) -> tuple[Group, mx.array]:
        """Coordinate descent in one group; see `steps.Steps`."""
        call = _kernel(self, "sweep", SWEEP, form.group_size, str(form.dtype))
        codes, scales, biases, change = call(
            inputs=[slope, *group, moment, _limits(form)], **_launch(slope.shape, form.group_size)
        )
        return Group(codes, scales, biases), change


def _launch(shape: tuple[int, ...], size: int) -> dict[str, Any]:
    """Where a kernel runs for arrays (batch, rows, size), and what it returns."""
    batch, rows, _ = shape
    return {
        "grid": (LANES * rows, batch, 1),
        "threadgroup": (LANES, 1, 1),
        "output_shapes": [(batch, rows, size), (batch, rows, 1), (batch, rows, 1), shape],
        "output_dtypes": [mx.uint8, mx.float32, mx.float32, mx.float32],
    }


@cache
def _limits(form: Format) -> mx.array:
    """The largest code, and how many ranges the search tries."""
    return mx.array([form.top, len(form.ranges)])


@cache
def _kernel(
    device: Device,
    name: str,
    arguments: tuple[tuple[str, ...], tuple[str, ...]],
    size: int,
    dtype: str,
) -> Callable[..., list[mx.array]]:
    folder = Path(__file__).parent / "kernels"
    constants = (
        f"namespace family {{}}\ntypedef {TYPES[device.platform][dtype.split('.')[-1]]} T;\n"
        f"constexpr CONSTANT int SIZE = {size};\n"
    )
    above = "\n".join([header(device.platform), constants, text(folder / "rounding.h")])
    body = PLACES[device.platform] + text(folder / f"{name}.body")
    return device.compile(
        name=name_of(device.platform, above, body),
        input_names=list(arguments[0]),
        output_names=list(arguments[1]),
        header=above,
        source=body,
        ensure_row_contiguous=False,
    )
