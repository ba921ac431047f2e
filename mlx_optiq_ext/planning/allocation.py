"""Exact allocation of stored bits: the multiple-choice knapsack problem.

Each tensor takes exactly one of its candidates; minimise the summed cost within a capacity of
stored bits. A Lagrangian relaxation gives a bound and a first solution, reduced costs then rule out
candidates that no optimal solution can hold, and a dynamic programme over what is left closes the
gap. Source: Kellerer, Pferschy, Pisinger, "Knapsack Problems" (2004), chapter 11.
"""

import math
from collections.abc import Sequence

import numpy as np

from ..errors import BudgetError

#: Cells of the dynamic programme's choice table (bytes of memory).
MAX_CELLS = 200_000_000


def allocate(
    costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], capacity: int
) -> list[int]:
    """Choose one candidate per tensor.

    Args:
        costs: ``costs[t][c]``, the cost of candidate ``c`` of tensor ``t``; finite.
        sizes: ``sizes[t][c]``, its stored bits; non-negative.
        capacity: Stored bits that all tensors may take together.

    Returns:
        The index of the chosen candidate for each tensor. The sum of costs is minimal; where the
        table would need more than ``MAX_CELLS``, sizes are rounded up to a coarser unit and the
        result is the best of that, the relaxation and a greedy fill.

    Raises:
        BudgetError: Even the smallest candidates do not fit.
    """
    smallest = sum(min(row) for row in sizes)
    if smallest > capacity:
        raise BudgetError(f"the smallest candidates take {smallest} bits of {capacity}")
    if not costs:
        return []
    rows = [
        _efficient(np.asarray(c, float), np.asarray(s, np.int64))
        for c, s in zip(costs, sizes, strict=True)
    ]
    lower, price = _relax(rows, capacity)
    best = _fill(rows, [_cheapest(row, price) for row in rows], capacity)
    best = min(best, _fill(rows, [0] * len(rows), capacity), key=lambda c: _cost(rows, c))
    # Rounding in the bound must not rule out what an exact bound would keep.
    slack = 1e-9 * (abs(lower) + price * capacity + _cost(rows, best))
    gap = max(_cost(rows, best) - lower, 0.0) + slack
    kept = [_reduced(row, price, gap) for row in rows]
    exact = _programme(rows, kept, capacity)
    if exact is not None and _cost(rows, exact) < _cost(rows, best):
        best = exact
    return [int(row[2][choice]) for row, choice in zip(rows, best, strict=True)]


Row = tuple[np.ndarray, np.ndarray, np.ndarray]


def _efficient(costs: np.ndarray, sizes: np.ndarray) -> Row:
    """Drop candidates that another one beats in cost at no more size; sort by size."""
    order = np.lexsort((costs, sizes))
    kept, lowest = [], math.inf
    for index in order:
        if costs[index] < lowest:
            kept.append(index)
            lowest = costs[index]
    index = np.array(kept)
    return costs[index], sizes[index], index


def _cheapest(row: Row, price: float) -> int:
    """The candidate of least cost plus priced size; the smaller one on a tie."""
    return int(np.argmin(row[0] + price * row[1]))


def _cost(rows: Sequence[Row], choice: Sequence[int]) -> float:
    return math.fsum(row[0][c] for row, c in zip(rows, choice, strict=True))


def _size(rows: Sequence[Row], choice: Sequence[int]) -> int:
    return sum(int(row[1][c]) for row, c in zip(rows, choice, strict=True))


def _relax(rows: Sequence[Row], capacity: int) -> tuple[float, float]:
    """Best Lagrangian bound and the price of a bit that gives it."""

    def bound(price: float) -> float:
        return math.fsum(float(np.min(row[0] + price * row[1])) for row in rows) - price * capacity

    def size(price: float) -> int:
        return _size(rows, [_cheapest(row, price) for row in rows])

    if size(0.0) <= capacity:
        return bound(0.0), 0.0
    low, high = 0.0, 1e-12
    while size(high) > capacity:
        low, high = high, high * 4
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if size(middle) > capacity else (low, middle)
    return bound(high), high


def _fill(rows: Sequence[Row], start: Sequence[int], capacity: int) -> list[int]:
    """Upgrade greedily by saving per bit while anything fits."""
    choice, room = list(start), capacity - _size(rows, start)
    while True:
        best, gain = None, 0.0
        for t, (costs, sizes, _) in enumerate(rows):
            for c in range(choice[t] + 1, len(costs)):
                more = sizes[c] - sizes[choice[t]]
                if more <= room and (costs[choice[t]] - costs[c]) / more > gain:
                    best, gain = (t, c), (costs[choice[t]] - costs[c]) / more
        if best is None:
            return choice
        t, c = best
        room -= int(rows[t][1][c] - rows[t][1][choice[t]])
        choice[t] = c


def _reduced(row: Row, price: float, gap: float) -> np.ndarray:
    """Candidates that a solution better than the known one may still hold."""
    priced = row[0] + price * row[1]
    return np.flatnonzero(priced - priced.min() <= gap)


def _programme(rows: Sequence[Row], kept: Sequence[np.ndarray], capacity: int) -> list[int] | None:
    """Dynamic programme over size, or None if rounding leaves no solution."""
    least = [int(row[1][k].min()) for row, k in zip(rows, kept, strict=True)]
    extra = [row[1][k] - low for row, k, low in zip(rows, kept, least, strict=True)]
    room = capacity - sum(least)
    if room < 0:
        return None
    room = min(room, sum(int(e.max()) for e in extra))
    unit = math.gcd(*(int(v) for e in extra for v in e)) or 1
    open_rows = [t for t, k in enumerate(kept) if len(k) > 1]
    states = room // unit + 1
    if states * max(1, len(open_rows)) > MAX_CELLS:
        unit = math.ceil(room / (MAX_CELLS // max(1, len(open_rows)) - 1))
        states = room // unit + 1
    value = np.zeros(states)
    table = np.zeros((len(open_rows), states), np.uint8)
    for line, t in enumerate(open_rows):
        steps = -(-extra[t] // unit)  # rounded up, so that the capacity holds
        following = np.full(states, np.inf)
        for position, step in enumerate(steps):
            if step >= states:
                continue
            offered = value[: states - step] + rows[t][0][kept[t][position]]
            target = following[step:]
            better = offered < target
            target[better] = offered[better]
            table[line, step:][better] = position
        value = following
    state = int(np.argmin(value))
    if not np.isfinite(value[state]):
        return None
    choice = [int(k[0]) for k in kept]
    for line in reversed(range(len(open_rows))):
        t = open_rows[line]
        position = table[line, state]
        choice[t] = int(kept[t][position])
        state -= int(-(-extra[t][position] // unit))
    return choice
