"""How processes divide work between them."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeVar

from .exchange import alone, gathered, handed, leads, rank, size

T = TypeVar("T")


def share(items: Sequence[T]) -> list[T]:
    """This process's part of a sequence, as long as the others' or one item longer or shorter."""
    return list(items[rank() :: size()])


def span(items: Sequence[T], weights: Sequence[float] | None = None) -> list[T]:
    """This process's part of a sequence; it starts where the part of the rank before ends.

    Args:
        items: The items to divide.
        weights: Relative work of each item; None if all are equal.
    """
    costs = [1.0] * len(items) if weights is None else list(weights)
    ends = list(accumulate(costs))
    middles = [end - cost / 2 for end, cost in zip(ends, costs, strict=True)]
    unit = ends[-1] / size() if ends else 1.0
    owners = [min(int(middle / unit), size() - 1) if unit else 0 for middle in middles]
    return [item for item, owner in zip(items, owners, strict=True) if owner == rank()]


def owners(weights: Sequence[float]) -> list[int]:
    """The process that takes each of some items: the heaviest first, to the one that has least.

    Args:
        weights: Relative work of each item.
    """
    found, loads = [0] * len(weights), [0.0] * size()
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        found[item] = least = loads.index(min(loads))
        loads[least] += weights[item]
    return found


def collected(own: Sequence[T], whose: Sequence[int]) -> list[T]:
    """What the processes made of some items, in all of them and bit for bit.

    Args:
        own: Lists of arrays, or of such lists: one for each item of this process, in order.
        whose: The process of each item, from `owners`.

    Returns:
        One for each item, in order.
    """
    if size() == 1:
        return list(own)
    found: dict[int, T] = {}
    for owner in sorted(set(whose)):
        items = [item for item, each in enumerate(whose) if each == owner]
        parts = handed(list(own) if owner == rank() else [], owner)
        found.update(zip(items, parts, strict=True))
    return [found[item] for item in range(len(whose))]


def silent(message: str) -> None:
    """Print nothing; replaces ``print`` in all processes but the first one."""


def led(work: Callable[[], T]) -> T | None:
    """Run a function on rank 0 while the others wait; returns None on the others."""
    found = None
    if leads():
        with alone():
            found = work()
    gathered(None)
    return found
