"""Tensors of which refinement leaves far less than predicted, found by rounding some of their rows.

The moments' residual predicts what error feedback leaves of plain rounding. Refinement also chooses
the order of the columns, and scales with the inputs in view. It leaves about half of the prediction
then, but a tenth or a hundredth where a few inputs are far larger than the others, as behind some
layers of real language models. Rows do not depend on each other, so a few tell.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ... import distributed
from ...planning.calibration import spread
from ..candidates import Tensor
from ..precision import AFFINE, Precision, dequantized
from ..rounding import threads
from ..rounding.feedback import round_weight
from ..rounding.metric import Metric
from ..rounding.selection import current
from ..rounding.steps import Steps
from .curvature import residual
from .kl import anchor
from .moments import Factors

#: Rows of a tensor that are rounded.
ROWS = 64
#: Most columns of them, and groups of columns with the largest inputs that are always among them.
COLUMNS, LARGEST = 2048, 4
#: Bits at which they are.
BITS = (2, 4)
#: What refinement usually leaves of a prediction.
USUAL = 0.5


@dataclass(frozen=True)
class Remainder:
    """Shares of a tensor's predicted KL that refinement leaves.

    Attributes:
        shares: Bits -> share, where it is known; positive.
    """

    shares: Mapping[int, float]

    def correction(self, bits: int) -> float:
        """What to multiply a prediction by, at most 1.

        Where the share is usual, predictions are kept: they are in proportion to each other.
        Between known bits the share is interpolated on a log scale, beyond them the nearest holds.
        """
        known = sorted(self.shares)
        if not known:
            return 1.0
        logs = [math.log(self.shares[b]) for b in known]
        return min(1.0, math.exp(float(np.interp(bits, known, logs))) / USUAL)


def remainders(
    weights: Mapping[str, mx.array],
    tensors: list[Tensor],
    found: Mapping[str, Factors],
    rows: int = ROWS,
    columns: int = COLUMNS,
) -> dict[str, Remainder]:
    """Round some rows of each tensor of a block as refinement will.

    The processes of ``mlx.launch`` share the tensors, and all get every result.

    Args:
        weights: Tensor path -> weight (..., out, in).
        tensors: Tensors of a block.
        found: Their factors.
        rows: Rows of each to round; 0 for none, which expects what the moments predict.
        columns: Most columns of these.

    Returns:
        Tensor path -> what is left. Of stacked experts nothing is known: their moments are not
        whole.
    """
    if not rows:
        return {t.path: Remainder({}) for t in tensors}
    sample = _Sample(current(distributed.silent), rows, columns)
    whole = [t for t in tensors if found[t.path].moment is not None]
    with threads.single():
        mine = [(t, sample.begun(t, found[t.path])) for t in distributed.share(whole)]
        own = {
            tensor.path: sample.remainder(tensor, weights[tensor.path], found[tensor.path], at)
            for tensor, at in mine
        }
    known = {path: r for part in distributed.gathered(own) for path, r in part.items()}
    return {t.path: known.get(t.path, Remainder({})) for t in tensors}


def _options(tensor: Tensor) -> list[Precision]:
    """The candidates nearest to `BITS` that are rounded."""
    return [p for p in sorted({anchor(tensor, bits) for bits in BITS}) if p.mode == AFFINE]


@dataclass(frozen=True)
class _Columns:
    """Some columns of a weight, and what is measured with them.

    Attributes:
        at: The columns, whole groups of every size, (n,).
        times: How many columns each stands for, (n,).
        metric: Of these columns' inputs.
        left: What error feedback should leave of each column's squared error, (n,).
    """

    at: np.ndarray
    times: np.ndarray
    metric: Metric
    left: np.ndarray


@dataclass(frozen=True)
class _Sample:
    steps: Steps
    rows: int
    columns: int
    known: list[_Columns] = field(default_factory=list)

    def begun(self, tensor: Tensor, found: Factors) -> _Columns:
        """The columns to round, whose factors other threads have begun to compute."""
        moment = found.moment
        assert moment is not None
        columns = self._columns(moment, max(p.group_size for p in tensor.precisions))
        for precision in _options(tensor):
            columns.metric.begin(precision.group_size)
        return columns

    def remainder(
        self, tensor: Tensor, weight: mx.array, found: Factors, columns: _Columns
    ) -> Remainder:
        """Round some rows at the candidates nearest to `BITS`."""
        rows = spread(len(weight), self.rows)
        # An embedding's rows share one moment, which has the gradients' weights in it.
        by = None if found.columns is not None else found.outputs
        importance = np.ones(len(rows)) if by is None else np.array(by)[rows]
        some = weight[mx.array(rows)][:, mx.array(columns.at)]
        shares = {p.bits: self._share(some, p, columns, importance) for p in _options(tensor)}
        return Remainder({bits: share for bits, share in shares.items() if share > 0})

    def _share(
        self, weight: mx.array, precision: Precision, columns: _Columns, importance: np.ndarray
    ) -> float:
        """What is left of the prediction, or 0 if there is no error."""
        exact = weight.astype(mx.float32)
        words, scales, biases = round_weight(
            weight, columns.metric, precision, weight.dtype, steps=self.steps
        )
        size, bits = precision.group_size, precision.bits
        grids = (a.astype(mx.float32) for a in (scales, biases))
        error = exact - mx.dequantize(words, *grids, group_size=size, bits=bits)
        plain = exact - dequantized(weight, precision, mx.float32)
        left = np.array((error @ columns.metric.moment) * error) @ columns.times
        expected = np.array(mx.square(plain)) @ (columns.left * columns.times)
        total = float(importance @ expected)
        return max(float(importance @ left), 0.0) / total if total > 0 else 0.0

    def _columns(self, moment: mx.array, unit: int) -> _Columns:
        """The columns to take; computed once for tensors with the same inputs."""
        at, times = some_columns(np.array(mx.diag(moment)), unit, self.columns)
        some = moment[mx.array(at)][:, mx.array(at)].astype(mx.float32)
        for known in self.known:
            if known.metric.moment.shape == some.shape and mx.array_equal(
                known.metric.moment, some
            ):
                return known
        self.known.append(_Columns(at, times, Metric(some), np.array(residual(some).diagonal)))
        return self.known[-1]


def some_columns(energy: np.ndarray, unit: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns in whole units, those of the most energy among them, the others evenly spread.

    Args:
        energy: Of each column, (in,).
        unit: Columns of a unit; divides ``in``.
        most: Columns to take at most, at least two times `LARGEST` units.

    Returns:
        The columns (n,), by rising index, and how many columns each stands for, (n,).
    """
    count = len(energy) // unit
    if len(energy) <= most:
        return np.arange(len(energy)), np.ones(len(energy))
    largest = np.argsort(-energy.reshape(count, unit).sum(axis=1), kind="stable")[:LARGEST]
    others = np.setdiff1d(np.arange(count), largest)
    taken = others[spread(len(others), max(most // unit - LARGEST, 1))]
    times = np.zeros(count)
    times[largest], times[taken] = 1.0, len(others) / len(taken)
    units = np.flatnonzero(times)
    at = (units[:, None] * unit + np.arange(unit)).ravel()
    return at, np.repeat(times[units], unit)
