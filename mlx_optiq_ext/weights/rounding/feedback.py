"""Affine rounding of one weight with the loss's curvature on its input and output side.

Minimises ``tr(G (W - Q) H (W - Q)^T)`` over codes, scales and biases, with ``H`` the second moment
of the inputs and ``G`` that of the loss's gradients at the outputs. Along the inputs, error
feedback follows GPTQ (Frantar et al., arXiv 2210.17323) and the coordinate descent that polishes it
QuantEase (Behdin et al., arXiv 2309.01885). Along the outputs, rows that are rounded already hand
their error to those that follow, as in YAQA (Tseng et al., arXiv 2505.22988), in blocks of rows.

The same lines run in numpy and on a GPU: ``steps`` has the arrays and the passes over columns.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from ..precision import Precision
from . import threads
from .codes import pack
from .elimination import blocked
from .grid import Format, Rounded
from .metric import Metric, Ordered, damped
from .steps import Steps

#: A weight's words, scales and biases, as ``mx.quantize`` returns them.
Quantized = tuple[mx.array, ...]

#: Least rows of a block that is rounded at once, and most blocks of a weight.
ROWS, BLOCKS = 16, 8
#: Passes of coordinate descent after the error feedback, along each side.
SWEEPS = 2
#: Elements of a weight that are worked on at once where rows do not depend on each other.
ELEMENTS = 1 << 24
#: Share of the mean diagonal that is added to the diagonal of the outputs' moment.
OUTPUT_DAMPING = 0.1


@dataclass(frozen=True)
class OutputSide:
    """How errors of a weight's rows are weighed together, prepared for blocks of rows.

    Attributes:
        order: Rows in the order of rounding, (out,).
        blocks: Of rows in that order.
        moment: Damped second moment of the gradients at the outputs in that order, (out, out).
        coupling: By how much errors of the blocks before move the targets of a block, (out, out).
    """

    order: np.ndarray
    blocks: list[slice]
    moment: np.ndarray
    coupling: np.ndarray

    @classmethod
    def of(cls, moment: np.ndarray, most: int = BLOCKS) -> "OutputSide":
        """Prepare a moment (out, out) in float32 for at most so many blocks."""
        order, blocks = _blocks(len(moment), most)
        own = np.ascontiguousarray(damped(moment, OUTPUT_DAMPING)[np.ix_(order, order)])
        return cls(order, blocks, own, np.ascontiguousarray(blocked(own, blocks).T))


@threads.single()
def round_weight(
    weight: mx.array,
    metric: Metric,
    precision: Precision,
    dtype: mx.Dtype,
    *,
    outputs: OutputSide | None = None,
    sweeps: int = SWEEPS,
    share: float = 0.0,
    steps: Steps,
) -> Quantized:
    """Quantize a weight to MLX's affine layout.

    Args:
        weight: (out, in); (experts, out, in) for stacked experts.
        metric: Of its inputs; of each expert's for stacked experts.
        precision: Bits and group size; the group size divides ``in``.
        dtype: Type of stored scales and biases; the search rounds them to it.
        outputs: The loss's side; None weighs the error of each output alike.
        sweeps: Coordinate-descent passes after the error feedback, along each side.
        share: How far the target makes up for the error of the layers before, from 0 to 1; the
            metric needs ``cross`` then.
        steps: Where to compute.

    Returns:
        ``(words, scales, biases)`` as ``mx.quantize`` returns them.
    """
    form = Format(precision.bits, precision.group_size, dtype)
    found = metric.ordered(form.group_size, steps)
    rounder = _Rounder(steps, found, form, sweeps, weight.ndim == 3)
    if outputs is not None:
        return rounder.both(rounder.target(weight, metric, share), outputs)
    rows = max(1, ELEMENTS * weight.shape[-2] // weight.size)
    parts = [
        rounder.stored(rounder.rows(rounder.target(weight[..., i : i + rows, :], metric, share)))
        for i in range(0, weight.shape[-2], rows)
    ]
    return tuple(mx.concatenate(list(same), axis=-2) for same in zip(*parts, strict=True))


@dataclass(frozen=True)
class _Rounder:
    steps: Steps
    found: Ordered
    form: Format
    sweeps: int
    stacked: bool

    def target(self, weight: mx.array, metric: Metric, share: float) -> Any:
        """A weight's rows in the order of rounding, moved to make up for earlier layers' errors."""
        plain = self.steps.array(weight if weight.ndim == 3 else weight[None])
        target = self.steps.take(plain, self.found.columns, -1)
        if not share:
            return target
        return target + share * metric.made_up(plain, self.found, self.steps)

    def rows(self, target: Any) -> Rounded:
        """Round rows that do not depend on each other."""
        done = self.steps.feedback(target, self.found, self.form)
        for _ in range(self.sweeps):
            done, _change = self.swept(done, self.steps.product(done.error, self.found.moment))
        return done

    def swept(self, done: Rounded, slope: Any) -> tuple[Rounded, Any]:
        """One pass of coordinate descent."""
        return self.steps.sweep(done, slope, self.found, self.form)

    def both(self, weight: Any, outputs: OutputSide) -> Quantized:
        """Blocks of rows in turn, each against what the blocks before it left to mend."""
        steps, order = self.steps, outputs.order
        coupling = steps.array(outputs.coupling)
        weight, parts = steps.take(weight, order, -2), []
        for at in outputs.blocks:
            own = target = weight[..., at, :]
            if parts:
                before = steps.concatenate([part.error for part in parts], axis=-2)
                target = own + steps.product(coupling[at, : at.start], before)
            part = self.rows(target)
            parts.append(part._replace(error=part.error + (own - target)))
            steps.start(parts[-1].error)
        curvature = steps.array(outputs.moment)
        for _ in range(self.sweeps):
            for number, at in enumerate(outputs.blocks):
                parts[number] = self.improved(parts, number, at, curvature)
                steps.start(parts[number].error)
        whole = [steps.concatenate(same, axis=-2) for same in zip(*parts, strict=True)]
        return self.stored(Rounded(*whole), np.argsort(order))

    def improved(self, parts: list[Rounded], number: int, at: slice, g: Any) -> Rounded:
        """One block swept against the whole error, if that helps.

        Its rows move at once and may overshoot together.
        """
        steps, moment, done = self.steps, self.found.moment, parts[number]
        error = steps.concatenate([part.error for part in parts], axis=-2)
        slope = steps.product(steps.product(g[at], error), moment)
        inside = g[at, at]
        own = steps.array(inside.diagonal())[:, None]
        part, change = self.swept(done, slope / own)
        again = steps.product(steps.product(inside, change), moment)
        helps = (change * (2 * slope + again)).sum() < 0
        return Rounded(
            *(steps.choose(helps, new, old) for new, old in zip(part, done, strict=True))
        )

    def stored(self, done: Rounded, rows: np.ndarray | None = None) -> Quantized:
        """Words, scales and biases in the order that the weight has them."""
        steps, found = self.steps, self.found
        columns, groups = (np.argsort(a, axis=-1) for a in (found.columns, found.groups))
        stored = (done.codes, columns), (done.scales, groups), (done.biases, groups)
        parts = [steps.take(part, at, -1) for part, at in stored]
        if rows is not None:
            parts = [steps.take(part, rows, -2) for part in parts]
        codes, scales, biases = (mx.array(part) for part in parts)
        words = pack(codes, self.form.bits)
        quantized = words, scales.astype(self.form.dtype), biases.astype(self.form.dtype)
        mx.eval(quantized)
        return quantized if self.stacked else tuple(a[0] for a in quantized)


def _blocks(rows: int, most: int) -> tuple[np.ndarray, list[slice]]:
    """An order of the rows, and blocks of it.

    Neighbouring rows are correlated most, so a block takes rows from all over the weight.
    """
    count = min(most, max(1, rows // ROWS))
    strides = [np.arange(start, rows, count) for start in range(count)]
    ends = np.cumsum([0, *(len(stride) for stride in strides)])
    return np.concatenate(strides), [slice(int(a), int(b)) for a, b in pairwise(ends)]
