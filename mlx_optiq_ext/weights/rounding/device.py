"""The steps of rounding on a GPU: a kernel for each pass over columns, and MLX's products."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...kernels import PLACES, TYPES, header, name_of, text
from .grid import Format, Rounded
from .metric import Ordered

FEEDBACK = (
    ("weight", "share", "unmixed", "inside_coupling", "coupling", "limits"),
    ("codes", "scales", "biases", "error"),
)
SWEEP = (
    ("slope", "codes", "scales", "biases", "moment", "limits"),
    ("new_codes", "new_scales", "new_biases", "change"),
)
#: Threads of a block, and rows that it rounds: one, or enough to share what is read of a moment.
THREADS, MOST_ROWS = 128, 4
#: Blocks that keep a large GPU busy.
BLOCKS = 1024


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


@dataclass(frozen=True, eq=False)
class Device:
    """Arrays (batch, rows, columns) in float32 on a GPU.

    Attributes:
        platform: ``"metal"`` or ``"cuda"``.
        compile: ``mx.fast.metal_kernel`` or ``mx.fast.cuda_kernel``.
        blocks: Blocks of threads to run, beyond which each takes more rows.
        exact: Whether products are taken of parts that keep 19 bits of each factor.
        beside: The processor is free while these compute.
    """

    platform: str
    compile: Callable[..., Any]
    blocks: int = BLOCKS
    exact: bool = True
    beside: bool = True

    def array(self, values: Any) -> mx.array:
        """Values in float32."""
        return mx.array(values).astype(mx.float32)

    def product(self, left: mx.array, right: mx.array) -> mx.array:
        """``left @ right``, to about 19 bits if that is wanted."""
        if not self.exact:
            return left @ right
        a, b = Split.of(left), Split.of(right)
        return a.high @ b.high + (a.high @ b.low + a.low @ b.high)

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

    def feedback(self, target: mx.array, found: Ordered, form: Format) -> Rounded:
        """Round rows column by column; see `steps.Steps`."""
        given = found.shares, found.unmixed, found.inside, found.coupling
        return Rounded(*self._launch("feedback", FEEDBACK, [target, *given], form))

    def sweep(
        self, done: Rounded, slope: mx.array, found: Ordered, form: Format
    ) -> tuple[Rounded, mx.array]:
        """One pass of coordinate descent; see `steps.Steps`."""
        given = [slope, done.codes, done.scales, done.biases, found.moment]
        codes, scales, biases, change = self._launch("sweep", SWEEP, given, form)
        return Rounded(codes, scales, biases, done.error + change), change

    def _launch(
        self,
        name: str,
        arguments: tuple[tuple[str, ...], tuple[str, ...]],
        given: list[mx.array],
        form: Format,
    ) -> list[mx.array]:
        """Run a kernel over the rows of its first input (batch, rows, in)."""
        batch, rows, columns = given[0].shape
        each = MOST_ROWS if batch * rows > self.blocks else 1
        call = _kernel(self, name, arguments, form.group_size, str(form.dtype), each)
        groups = (batch, rows, columns // form.group_size)
        return call(
            inputs=[*given, _limits(form)],
            grid=(THREADS * -(-rows // each), batch, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[given[0].shape, groups, groups, given[0].shape],
            output_dtypes=[mx.uint8, mx.float32, mx.float32, mx.float32],
        )


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
    rows: int,
) -> Callable[..., list[mx.array]]:
    folder = Path(__file__).parent / "kernels"
    constants = (
        f"namespace family {{}}\ntypedef {TYPES[device.platform][dtype.split('.')[-1]]} T;\n"
        f"constexpr CONSTANT int SIZE = {size}, ROWS = {rows}, THREADS = {THREADS};\n"
    )
    above = "\n".join([header(device.platform), constants, text(folder / "rounding.h")])
    body = PLACES[device.platform] + text(folder / f"{name}.body")
    return device.compile(
        name=name_of(device.platform, above, body),
        input_names=list(arguments[0]),
        output_names=list(arguments[1]),
        header=above,
        source=body,
        ensure_row_contiguous=True,
    )
