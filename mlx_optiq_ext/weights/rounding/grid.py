"""One weight's codes, scales and biases while they are searched, and one pass over its columns.

Short numpy steps: a column depends on the one before, and as an array graph each step would cost
more to dispatch than to compute.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

#: Shares of a group's range that the search for its scale starts from.
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
TINY = 1e-7
#: Columns whose effect on later ones is put off and then added in one product.
LAZY = 16


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

    def stored(self, values: np.ndarray) -> np.ndarray:
        """Values as they come back from ``dtype``, in float32."""
        if self.dtype == mx.float16:
            return values.astype(np.float16).astype(np.float32)
        if self.dtype == mx.bfloat16:
            bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
            return rounded.view(np.float32)
        return values.astype(np.float32)


@dataclass
class Grid:
    """Codes (rows, in), scales and biases (rows, groups), all float32."""

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray

    def weight(self) -> np.ndarray:
        """What the grid stands for, (rows, in)."""
        grouped = self.codes.reshape(*self.scales.shape, -1)
        left = grouped * self.scales[..., None] + self.biases[..., None]
        return left.reshape(self.codes.shape)

    def rows(self, at: slice | np.ndarray) -> "Grid":
        """Some rows of it."""
        return Grid(self.codes[at], self.scales[at], self.biases[at])

    def columns(self, at: np.ndarray, groups: np.ndarray) -> "Grid":
        """Its columns and groups in another order."""
        return Grid(self.codes[:, at], self.scales[:, groups], self.biases[:, groups])

    def put(self, at: slice, part: "Grid") -> None:
        """Replace some rows."""
        self.codes[at], self.scales[at], self.biases[at] = part.codes, part.scales, part.biases


def _divided(above: np.ndarray, below: np.ndarray, where: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros_like(above), where=where)


def fit(weight: np.ndarray, importance: np.ndarray, form: Format) -> tuple[np.ndarray, np.ndarray]:
    """Search each row's scale and bias for the least weighted squared error.

    Args:
        weight: One group, (rows, group).
        importance: Weight of each column's squared error, (group,).
        form: Bits and storage dtype.

    Returns:
        ``(scales, biases)``, (rows, 1), exact in the storage dtype.
    """
    share = (importance / max(float(importance.sum()), TINY)).astype(np.float32)
    low, high = weight.min(-1, keepdims=True), weight.max(-1, keepdims=True)
    mean = (weight @ share)[:, None]
    best: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    # Fine grids gain nothing from a much narrower range.
    for width in RANGES if form.bits < 6 else RANGES[:3]:
        scale = form.stored(np.maximum((high - low) * (width / form.top), TINY))
        bias = form.stored((low + high) / 2 - scale * (form.top / 2))
        for _ in range(3):
            codes = np.clip(np.rint((weight - bias) / scale), 0, form.top)
            error = (np.square(codes * scale + bias - weight) @ share)[:, None]
            if best is None:
                best = scale, bias, error
            else:
                better = error < best[2]
                best = (
                    np.where(better, scale, best[0]),
                    np.where(better, bias, best[1]),
                    np.minimum(error, best[2]),
                )
            # The least-squares line through the codes at hand.
            weighted = codes * share
            c, cc = weighted.sum(-1, keepdims=True), (weighted * codes).sum(-1, keepdims=True)
            cw, spread = (weighted * weight).sum(-1, keepdims=True), cc - c * c
            fitted = form.stored(_divided(cw - c * mean, spread, spread > 1e-9))
            scale = np.where(np.abs(fitted) > TINY, fitted, scale)
            bias = form.stored(mean - scale * c)
    assert best is not None
    return best[0], best[1]


def _whole(values: np.ndarray, top: float) -> None:
    """Round to codes in place; numpy's clip takes longer than both of its halves."""
    np.rint(values, out=values)
    np.maximum(values, 0, out=values)
    np.minimum(values, top, out=values)


def _turns(block: np.ndarray, coupling: np.ndarray) -> Iterator[int]:
    """The lines of a block in turn; what the caller leaves in a line moves those that follow.

    Args:
        block: One line a column, (group, rows).
        coupling: How much of line ``k`` is added to line ``j > k``, (group, group).
    """
    # Among a few lines at once, to all further ones in one product: GPTQ's lazy batches.
    for first in range(0, len(block), LAZY):
        last = min(first + LAZY, len(block))
        for k in range(first, last):
            yield k
            if k + 1 < last:
                block[k + 1 : last] += coupling[k, k + 1 : last, None] * block[k]
        if last < len(block):
            block[last:] += coupling[first:last, last:].T @ block[first:last]


def feedback(weight: np.ndarray, moment: np.ndarray, factor: np.ndarray, form: Format) -> Grid:
    """Round column by column; each column's error moves to the columns not yet rounded (GPTQ).

    Args:
        weight: Target, (rows, in).
        moment: Damped second moment of the inputs, (in, in).
        factor: Upper Cholesky factor of its inverse.
        form: Bits, group size and storage dtype.
    """
    weight, importance, size = weight.copy(), np.diag(moment), form.group_size
    codes = np.empty_like(weight)
    scales, biases = [], []
    for start in range(0, weight.shape[1], size):
        end = start + size
        scale, bias = fit(weight[:, start:end], importance[start:end], form)
        s, b, local = scale[:, 0], bias[:, 0], factor[start:end, start:end]
        block = np.ascontiguousarray(weight[:, start:end].T)
        taken = np.empty_like(block)
        for k in _turns(block, -local):
            row, code = block[k], taken[k]
            np.subtract(row, b, out=code)
            code /= s
            _whole(code, form.top)
            row -= code * s + b
            row /= local[k, k]
        codes[:, start:end] = taken.T
        scales.append(scale)
        biases.append(bias)
        weight[:, end:] -= block.T @ factor[start:end, end:]
    return Grid(codes, np.concatenate(scales, axis=1), np.concatenate(biases, axis=1))


def sweep(
    slope: np.ndarray,
    moment: np.ndarray,
    grid: Grid,
    form: Format,
    coupling: np.ndarray | None = None,
) -> tuple[Grid, np.ndarray]:
    """One pass of coordinate descent: refit each group's scale and bias, then re-round its columns.

    Args:
        slope: Error times curvature, (rows, in), per row in units of the row's own curvature.
        moment: Damped second moment of the inputs, (in, in).
        grid: Where to start; left as it was.
        form: Bits, group size and storage dtype.
        coupling: How a change of one row moves the slope of the others, (rows, rows); None for not.

    Returns:
        The new grid, and the change of the error (target minus weight).
    """
    grid = Grid(grid.codes.copy(), grid.scales.copy(), grid.biases.copy())
    slope, total, size = slope.copy(), np.empty_like(grid.codes), form.group_size
    for group, start in enumerate(range(0, grid.codes.shape[1], size)):
        end, at = start + size, slice(group, group + 1)
        local = np.ascontiguousarray(moment[start:end, start:end])
        codes, own = grid.codes[:, start:end], slope[:, start:end]
        scale, bias = _refit(codes, grid.scales[:, at], grid.biases[:, at], own, local, form)
        moved = (grid.scales[:, at] - scale) * codes + (grid.biases[:, at] - bias)
        block = np.ascontiguousarray((own + moved @ local).T)
        before, again = np.ascontiguousarray(codes.T), np.empty((size, len(codes)), np.float32)
        s = np.ascontiguousarray(scale[:, 0])
        for k in _turns(block, local):
            row, code = block[k], again[k]
            np.divide(row, s * local[k, k], out=code)
            code += before[k]
            _whole(code, form.top)
            np.subtract(before[k], code, out=row)
            row *= s
        changed = moved + (codes - again.T) * scale
        push = changed if coupling is None else coupling @ changed
        slope[:, end:] += push @ moment[start:end, end:]
        total[:, start:end], grid.codes[:, start:end] = changed, again.T
        grid.scales[:, at], grid.biases[:, at] = scale, bias
    return grid, total


def _refit(
    codes: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    slope: np.ndarray,
    local: np.ndarray,
    form: Format,
) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares scale and bias of one group, with its codes and all other groups held."""
    weighted, oo = codes @ local, local.sum()
    cc, co = (weighted * codes).sum(-1, keepdims=True), weighted.sum(-1, keepdims=True)
    rc, ro = (slope * codes).sum(-1, keepdims=True), slope.sum(-1, keepdims=True)
    spread = cc * oo - co * co
    solvable = spread > 1e-6 * cc * oo
    fitted = form.stored(scale + _divided(rc * oo - ro * co, spread, solvable))
    fitted = np.where(np.abs(fitted) > TINY, fitted, scale)
    # The bias answers for the scale as stored, not as solved.
    shifted = form.stored(bias + (ro - (fitted - scale) * co) / oo)
    return fitted, np.where(solvable, shifted, bias)
