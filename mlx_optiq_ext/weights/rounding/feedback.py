"""Affine rounding of one weight against the curvature of the loss on both of its sides.

Minimises ``tr(G (W - Q) H (W - Q)^T)`` over codes, scales and biases, with ``H`` the second moment
of the inputs and ``G`` that of the loss's gradients at the outputs. Along the inputs, error
feedback follows GPTQ (Frantar et al., arXiv 2210.17323) and the coordinate descent that polishes it
QuantEase (Behdin et al., arXiv 2309.01885). Along the outputs, rows that are rounded already hand
their error to those that follow, as in YAQA (Tseng et al., arXiv 2505.22988), in blocks of rows.
"""

from itertools import pairwise

import mlx.core as mx
import numpy as np

from ..precision import Precision
from .codes import pack
from .grid import Format, Grid, feedback, sweep

#: A weight's words, scales and biases, as ``mx.quantize`` returns them.
Quantized = tuple[mx.array, ...]

#: Rows that are rounded at once at least, and how many such blocks a weight has at most.
ROWS, BLOCKS = 16, 24


def round_weight(
    weight: mx.array,
    moment: mx.array,
    precision: Precision,
    dtype: mx.Dtype,
    *,
    outputs: mx.array | None = None,
    sweeps: int = 2,
    damping: float = 0.02,
    output_damping: float = 0.1,
) -> Quantized:
    """Quantize a weight to MLX's affine layout.

    Args:
        weight: Target, (out, in).
        moment: Second moment of the inputs, (in, in), of any positive scale.
        precision: Bits and group size; the group size divides ``in``.
        dtype: In which scales and biases are stored; the search sees them rounded to it.
        outputs: Second moment of the gradients at the outputs, (out, out); None for the identity.
        sweeps: Coordinate-descent passes after the error feedback, along each side.
        damping: Share of the mean diagonal that is added to ``moment``'s diagonal.
        output_damping: The same for ``outputs``.

    Returns:
        ``(words, scales, biases)`` as ``mx.quantize`` returns them.
    """
    form = Format(precision.bits, precision.group_size, dtype)
    h = _damped(_array(moment), damping)
    columns, groups = column_order(h, form.group_size)
    target, h = _array(weight)[:, columns], np.ascontiguousarray(h[np.ix_(columns, columns)])
    if outputs is None:
        grid = _by_columns(target, h, _inverse_factor(h), form, sweeps)
    else:
        grid = _both(target, h, _damped(_array(outputs), output_damping), form, sweeps)
    grid = grid.columns(np.argsort(columns), np.argsort(groups))
    return (
        pack(mx.array(grid.codes), precision.bits),
        mx.array(grid.scales).astype(dtype),
        mx.array(grid.biases).astype(dtype),
    )


def _array(values: mx.array) -> np.ndarray:
    return np.array(values.astype(mx.float32))


def _damped(moment: np.ndarray, damping: float) -> np.ndarray:
    mean = max(float(np.diag(moment).mean()), 1e-30)
    return (moment / mean + (damping + 1e-9) * np.eye(len(moment))).astype(np.float32)


def column_order(moment: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The order in which error feedback leaves least: what others can mend little comes first.

    What is rounded last keeps its whole variance, what is rounded before keeps the part that later
    columns do not explain. Taking the smallest from the back is the ordering of successive
    interference cancellation (V-BLAST, Wolniansky et al., 1998), here group by group, since a group
    shares its scale, and then within each group.

    Args:
        moment: Damped second moment of the inputs, (in, in).
        size: Group size.

    Returns:
        Columns in the order of rounding, (in,), and groups, (in / size,).
    """
    left, unexplained = list(range(len(moment) // size)), moment.astype(np.float32)
    columns: list[np.ndarray] = []
    groups: list[int] = []
    while left:
        energy = np.diag(unexplained).reshape(-1, size).sum(axis=1)
        group = min(left, key=lambda g: energy[g])
        left.remove(group)
        at = slice(group * size, (group + 1) * size)
        groups.append(group)
        columns.append(group * size + _by_variance(unexplained[at, at])[::-1])
        if left:
            own = unexplained[at]
            unexplained = unexplained - own.T @ np.linalg.solve(own[:, at], own)
    return np.concatenate(columns[::-1]), np.asarray(groups[::-1])


def _by_variance(moment: np.ndarray) -> np.ndarray:
    """Columns by what those before them leave unexplained, each time the smallest."""
    left, order = moment.astype(np.float64), []
    remaining = np.full(len(left), 0.0)
    for _ in range(len(left)):
        k = int(np.argmin(np.diag(left) + remaining))
        order.append(k)
        remaining[k] = np.inf
        left -= np.outer(left[k], left[k]) / max(left[k, k], 1e-12)
    return np.asarray(order)


def _inverse_factor(moment: np.ndarray) -> np.ndarray:
    """Upper Cholesky factor of the inverse."""
    inverse = np.linalg.inv(moment.astype(np.float64))
    upper = np.linalg.cholesky((inverse + inverse.T) / 2).T
    return np.ascontiguousarray(upper, dtype=np.float32)


def _by_columns(
    weight: np.ndarray, h: np.ndarray, factor: np.ndarray, form: Format, sweeps: int
) -> Grid:
    grid = feedback(weight, h, factor, form)
    for _ in range(sweeps):
        grid, _ = sweep((weight - grid.weight()) @ h, h, grid, form)
    return grid


def _both(weight: np.ndarray, h: np.ndarray, g: np.ndarray, form: Format, sweeps: int) -> Grid:
    """Blocks of rows in turn, each against what the blocks before it left to mend."""
    order, blocks = _blocks(len(weight))
    weight, g = weight[order], np.ascontiguousarray(g[np.ix_(order, order)])
    factor, upper, target = _inverse_factor(h), _inverse_factor(g), weight.copy()
    parts = []
    for at in blocks:
        parts.append(_by_columns(target[at], h, factor, form, sweeps))
        error = target[at] - parts[-1].weight()
        rest = slice(at.stop, None)
        target[rest] -= upper[at, rest].T @ np.linalg.solve(upper[at, at].T, error)
    grid = Grid(
        np.concatenate([p.codes for p in parts]),
        np.concatenate([p.scales for p in parts]),
        np.concatenate([p.biases for p in parts]),
    )
    error = weight - grid.weight()
    for _ in range(sweeps):
        for at in blocks:
            own = np.diag(g)[at, None]
            slope = (g[at] @ error) @ h
            part, change = sweep(slope / own, h, grid.rows(at), form, g[at, at] / own)
            # Rows of a block move at once and may overshoot together: keep only what helps.
            if (change * (2 * slope + (g[at, at] @ change) @ h)).sum() < 0:
                grid.put(at, part)
                error[at] += change
    return grid.rows(np.argsort(order))


def _blocks(rows: int) -> tuple[np.ndarray, list[slice]]:
    """An order of the rows, and blocks of it.

    Neighbours go together most, so a block takes rows from all over the weight.
    """
    count = min(BLOCKS, max(1, rows // ROWS))
    strides = [np.arange(start, rows, count) for start in range(count)]
    ends = np.cumsum([0, *(len(stride) for stride in strides)])
    return np.concatenate(strides), [slice(int(a), int(b)) for a, b in pairwise(ends)]
