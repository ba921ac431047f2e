"""The order in which columns are rounded, and how much of an error each hands to the next.

With a second moment ``H = (I + A) D (I + A)^T``, ``A`` strictly upper triangular, the best that a
column can do about the errors ``E`` of those before it is to move its target by ``E A`` (LDLQ, Chee
et al., arXiv 2307.13304; the same as GPTQ's updates). ``A`` comes from eliminating columns from the
last to the first, and so does the order: at each step the column that the others explain least of
is still free to be chosen.
"""

from dataclasses import dataclass

import numpy as np

from . import threads

#: Rows of a large moment that are worked on at once, and how many rows are not yet large.
ROWS, SMALL = 512, 2048


@dataclass(frozen=True)
class Elimination:
    """A damped second moment in the order of rounding, and its factors.

    Attributes:
        columns: Columns in the order of rounding, (in,).
        groups: Groups in that order, (in / group size,).
        moment: The moment in that order, (in, in).
        coupling: ``A`` above, (in, in), strictly upper triangular.
        variances: The diagonal of ``D``, (in,): what earlier columns leave unexplained of each.
    """

    columns: np.ndarray
    groups: np.ndarray
    moment: np.ndarray
    coupling: np.ndarray
    variances: np.ndarray


def eliminated(moment: np.ndarray, size: int, *, small: int = SMALL) -> Elimination:
    """Order and factor a moment, group by group, since a group shares its scale.

    What is rounded last keeps its whole variance, what is rounded before keeps the part that later
    columns do not explain. Taking the smallest from the back is the ordering of successive
    interference cancellation (V-BLAST, Wolniansky et al., 1998), for groups and within each.

    Args:
        moment: Damped second moment of the inputs, (in, in) float32.
        size: Group size.
        small: Rows from which on several threads work on one moment.
    """
    left, columns = moment.copy(), np.arange(len(moment))
    for end in range(len(moment), 0, -size):
        energy = np.diagonal(left)[:end].reshape(-1, size).sum(axis=1)
        start, chosen = end - size, int(energy.argmin()) * size
        _exchange(left, columns, slice(chosen, chosen + size), slice(start, end))
        own = left[start:end, start:end]
        inside = _by_variance(own)
        columns[start:end] = columns[start:end][inside]
        left[start:end, start:] = left[start:end, start:][inside]
        left[:end, start:end] = left[:end, start:end][:, inside]
        factor = _upper_factor(own)
        if start:
            inverse = np.linalg.inv(factor).astype(np.float32)  # small, and triangular
            above = left[:start, start:end] @ inverse.T
            _take_away(left[:start, :start], above, small)
            left[:start, start:end] = above
        left[start:end, start:end] = factor
    scale = np.diagonal(left).copy()
    coupling = np.triu(left / scale, 1)
    ordered = np.ascontiguousarray(moment[np.ix_(columns, columns)])
    return Elimination(columns, columns[::size] // size, ordered, coupling, np.square(scale))


def blocked(moment: np.ndarray, blocks: list[slice]) -> np.ndarray:
    """The coupling of consecutive blocks that are rounded at once: nothing within a block.

    Args:
        moment: Damped second moment, (rows, rows), in the order of rounding.
        blocks: Of all rows, in order.

    Returns:
        (rows, rows), with zeros on and below the diagonal blocks.
    """
    left, coupling = moment.astype(np.float64), np.zeros(moment.shape, np.float32)
    for at in reversed(blocks):
        above = left[: at.start, at]
        coupling[: at.start, at] = explained = above @ np.linalg.inv(left[at, at])
        left[: at.start, : at.start] -= explained @ above.T
    return coupling


def _take_away(left: np.ndarray, above: np.ndarray, small: int) -> None:
    """``left -= above @ above.T``, the rows of a large one side by side."""
    if len(left) <= small:
        left -= above @ above.T
        return

    def part(rows: slice) -> None:
        left[rows] -= above[rows] @ above.T

    threads.each(part, [slice(i, i + ROWS) for i in range(0, len(left), ROWS)])


def _exchange(left: np.ndarray, columns: np.ndarray, a: slice, b: slice) -> None:
    """Swap two groups: rows wholly, for what is eliminated already, and columns of what is left."""
    if a == b:
        return
    columns[a], columns[b] = columns[b].copy(), columns[a].copy()
    left[a], left[b] = left[b].copy(), left[a].copy()
    top = left[: b.stop]
    top[:, a], top[:, b] = top[:, b].copy(), top[:, a].copy()


def _by_variance(moment: np.ndarray) -> np.ndarray:
    """Columns of a group by what those before them leave unexplained, the smallest last."""
    left, order = moment.astype(np.float64), np.empty(len(moment), np.int64)
    free = np.zeros(len(left))
    for place in reversed(range(len(left))):
        k = int(np.argmin(np.diagonal(left) + free))
        order[place], free[k] = k, np.inf
        left -= np.outer(left[k], left[k] / max(left[k, k], 1e-12))
    return order


def _upper_factor(moment: np.ndarray) -> np.ndarray:
    """``R`` with ``moment = R R^T``, upper triangular."""
    exact = moment[::-1, ::-1].astype(np.float64)
    return np.linalg.cholesky((exact + exact.T) / 2)[::-1, ::-1]
