"""Allocation of stored bits: the multiple-choice knapsack problem, in bounded time.

Each tensor takes exactly one of its candidates; minimise the summed cost within a capacity of
stored bits.

1. Candidates that another one beats in cost at no more size are dropped, and the lower convex hull
   of the others is found: the steps along it have falling savings per bit.
2. All tensors' steps in order of saving per bit, taken while they fit, solve the linear relaxation.
   The first step that does not fit gives the price of a bit and a lower bound.
3. Steps behind it that still fit make a first solution.
4. Candidates whose reduced cost exceeds the gap between solution and bound are in no better
   solution. A dynamic programme over what is left closes the gap. Where its table would be too
   large, sizes are rounded up to a coarser unit.

Source: Kellerer, Pferschy, Pisinger, "Knapsack Problems" (2004), chapter 11.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import BudgetError, InputError

#: Additions that the dynamic programme may take, about a tenth of a second. Each also takes a byte.
OPERATIONS = 30_000_000


def allocate(
    costs: Sequence[Sequence[float]],
    sizes: Sequence[Sequence[int]],
    capacity: int,
    *,
    names: Sequence[str] = (),
    operations: int = OPERATIONS,
) -> list[int]:
    """Choose one candidate per tensor.

    Args:
        costs: ``costs[t][c]``, the cost of candidate ``c`` of tensor ``t``; finite.
        sizes: ``sizes[t][c]``, its stored bits; non-negative.
        capacity: Stored bits that all tensors may take together.
        names: Names of the tensors, for messages.
        operations: Bound on the work of the exact step.

    Returns:
        The index of the chosen candidate for each tensor. The sum of costs is minimal where
        ``operations`` allow an exact table; else it is at most one step of one tensor above the
        minimum.

    Raises:
        BudgetError: Even the smallest candidates do not fit.
        InputError: A cost is not a finite number, or a tensor has no candidate.
    """
    smallest = sum(min(row, default=0) for row in sizes)
    if smallest > capacity:
        raise BudgetError(f"the smallest candidates take {smallest} bits of {capacity}")
    if not costs:
        return []
    table = _Table.of(costs, sizes, names)
    choice, price, bound = _relaxed(table, capacity)
    best = table.cost(choice)
    # Rounding in the bound must not rule out what an exact bound would keep.
    slack = 1e-9 * (abs(bound) + price * capacity + abs(best))
    kept = table.near(price, max(best - bound, 0.0) + slack)
    exact = _programme(table, kept, capacity, operations)
    if exact is not None and table.cost(exact) < best:
        choice = exact
    return [int(c) for c in table.origin[np.arange(len(choice)), choice]]


@dataclass(frozen=True)
class _Table:
    """Candidates by rising size and falling cost, one row a tensor.

    Attributes:
        costs: (tensors, most candidates), infinite where a row has no more.
        sizes: The same shape, int64.
        origin: Column -> index in the caller's row.
    """

    costs: np.ndarray
    sizes: np.ndarray
    origin: np.ndarray

    @classmethod
    def of(
        cls,
        costs: Sequence[Sequence[float]],
        sizes: Sequence[Sequence[int]],
        names: Sequence[str] = (),
    ) -> "_Table":
        widths = [len(row) for row in costs]
        if widths != [len(row) for row in sizes]:
            raise ValueError("costs and sizes differ in shape")
        if min(widths) == 0:
            raise InputError(f"{_named(names, widths.index(0))} has no candidate")
        shape = (len(widths), max(widths))
        cost, size = np.full(shape, np.inf), np.zeros(shape, np.int64)
        present = np.arange(shape[1]) < np.array(widths)[:, None]
        cost[present] = np.concatenate([np.asarray(row, float) for row in costs])
        size[present] = np.concatenate([np.asarray(row, np.int64) for row in sizes])
        wrong = np.argwhere(present & ~np.isfinite(cost))
        if len(wrong):
            t, c = wrong[0]
            raise InputError(
                f"the sensitivity of {_named(names, t)} came out as {cost[t, c]} at candidate {c}: "
                "its weights or its inputs are damaged, or too large to compute with"
            )
        largest = np.abs(cost[present]).max()
        if largest > 1e150:
            cost /= largest  # sums and products of such costs would overflow
        size[~present] = np.iinfo(np.int64).max
        order = np.lexsort((cost, size), axis=-1)
        cost, size = np.take_along_axis(cost, order, 1), np.take_along_axis(size, order, 1)
        before = np.minimum.accumulate(cost, axis=1)
        beaten = np.zeros(shape, bool)
        beaten[:, 1:] = cost[:, 1:] >= before[:, :-1]
        cost[beaten] = np.inf
        # What is left moves to the front, in the same order.
        front = np.argsort(beaten, axis=1, kind="stable")
        cost, size = np.take_along_axis(cost, front, 1), np.take_along_axis(size, front, 1)
        size[np.isinf(cost)] = 0
        return cls(cost, size, np.take_along_axis(order, front, 1))

    def cost(self, choice: np.ndarray) -> float:
        """Summed cost of a column for each tensor."""
        return math.fsum(self.costs[np.arange(len(choice)), choice])

    def size(self, choice: np.ndarray) -> int:
        """Summed size of a column for each tensor."""
        return int(self.sizes[np.arange(len(choice)), choice].sum())

    def near(self, price: float, gap: float) -> np.ndarray:
        """Candidates that a solution within ``gap`` of the bound may hold, as a mask."""
        priced = self.costs + price * self.sizes
        return np.isfinite(priced) & (priced - priced.min(axis=1, keepdims=True) <= gap)

    def steps(self) -> tuple[np.ndarray, ...]:
        """Steps along every row's convex hull: row, column reached, extra size, saving."""
        rows = np.arange(len(self.costs))
        at = np.zeros(len(rows), np.int64)
        found = []
        while len(rows):
            cost, size = self.costs[rows, at], self.sizes[rows, at]
            saving = cost[:, None] - self.costs[rows]
            more = self.sizes[rows] - size[:, None]
            with np.errstate(divide="ignore", invalid="ignore"):
                rate = np.where((saving > 0) & (more > 0), saving / more, -np.inf)
            # Of equal rates the last one, for fewer steps along the same line.
            best = rate.shape[1] - 1 - np.argmax(rate[:, ::-1], axis=1)
            line = np.arange(len(rows))
            open_ = np.isfinite(rate[line, best])
            line, best, rows = line[open_], best[open_], rows[open_]
            found.append((rows, best, more[line, best], saving[line, best]))
            at = best
        return tuple(np.concatenate(part) for part in zip(*found, strict=True))


def _named(names: Sequence[str], tensor: int) -> str:
    return names[tensor] if names else f"tensor {tensor}"


def _relaxed(table: _Table, capacity: int) -> tuple[np.ndarray, float, float]:
    """A solution near the linear relaxation's, the price of a bit, and the lower bound."""
    choice = np.zeros(len(table.costs), np.int64)
    room = capacity - table.size(choice)
    rows, columns, extra, saving = table.steps()
    rate = saving / extra
    order = np.lexsort((np.arange(len(rows)), -rate))
    rows, columns, extra, rate = rows[order], columns[order], extra[order], rate[order]
    fits = np.cumsum(extra) <= room
    first = int(np.argmin(fits)) if not fits.all() else len(fits)
    choice[rows[:first]] = columns[:first]  # a row's steps come in order: the last one stays
    if first == len(fits):
        cost = table.cost(choice)
        return choice, 0.0, cost
    room -= int(extra[:first].sum())
    price = float(rate[first])
    bound = table.cost(choice) - price * room
    for row, column in zip(rows[first:].tolist(), columns[first:].tolist(), strict=True):
        more = int(table.sizes[row, column] - table.sizes[row, choice[row]])
        if 0 < more <= room:
            choice[row], room = column, room - more
    return choice, price, bound


def _programme(
    table: _Table, kept: np.ndarray, capacity: int, operations: int
) -> np.ndarray | None:
    """Dynamic programme over size, or None if rounding leaves no solution."""
    columns = [np.flatnonzero(row) for row in kept]
    least = [int(table.sizes[t, c].min()) for t, c in enumerate(columns)]
    extra = [table.sizes[t, c] - low for (t, c), low in zip(enumerate(columns), least, strict=True)]
    room = capacity - sum(least)
    if room < 0:
        return None
    room = min(room, sum(int(e.max()) for e in extra))
    unit = math.gcd(*(int(v) for e in extra for v in e)) or 1
    open_rows = [t for t, c in enumerate(columns) if len(c) > 1]
    work = max(1, sum(len(columns[t]) for t in open_rows))
    states = room // unit + 1
    if states * work > operations:
        unit = math.ceil(room / max(operations // work - 1, 1))
        states = room // unit + 1
    value = np.zeros(states)
    chosen = np.zeros((len(open_rows), states), np.uint8)
    for line, t in enumerate(open_rows):
        following = np.full(states, np.inf)
        for position, step in enumerate((-(-extra[t] // unit)).tolist()):  # rounded up, to fit
            if step >= states:
                continue
            offered = value[: states - step] + table.costs[t, columns[t][position]]
            target = following[step:]
            better = offered < target
            target[better] = offered[better]
            chosen[line, step:][better] = position
        value = following
    state = int(np.argmin(value))
    if not np.isfinite(value[state]):
        return None
    choice = np.array([c[0] for c in columns])
    for line in reversed(range(len(open_rows))):
        t = open_rows[line]
        position = chosen[line, state]
        choice[t] = columns[t][position]
        state -= int(-(-extra[t][position] // unit))
    return choice
