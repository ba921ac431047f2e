"""Sums over the sequences of several processes, in the order of a single process.

Floating-point sums depend on their order. So each process adds its part to the sums that the
process before it passes on, one block of the model behind that process.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx

from ... import distributed
from ...model.replay import Recording
from .backward import GradientError, told_apart
from .moments import Factors

#: Paths of a part of the model, and a function that adds the sequences' part to their factors.
Block = tuple[list[str], Callable[[dict[str, Factors]], None]]


def once(recording: Recording) -> bool:
    """Whether no layer runs twice."""
    ran = [call.index for call in recording]
    return len(set(ran)) == len(ran)


def relayed(blocks: list[Block], tokens: int) -> Iterator[dict[str, Factors]]:
    """Blocks that each process adds to in turn, one block behind the process before it."""
    found: dict[str, Factors] = {}
    for tick in range(len(blocks) + distributed.size() - 1):
        position, trouble = tick - distributed.rank(), ""
        if 0 <= position < len(blocks):
            paths, add = blocks[position]
            found = found or {path: Factors(tokens=tokens) for path in paths}
            try:
                with told_apart():
                    add(found)
            except GradientError as error:  # the other processes have not reached it yet
                trouble = str(error)
        else:
            found = {}
        troubles = distributed.gathered(trouble)
        if any(troubles):
            raise GradientError(max(troubles))
        before, last = distributed.passed(*_packed(found))
        found = _unpacked(*before)
        if tick >= distributed.size() - 1:
            yield _unpacked(*last)


def _packed(found: Mapping[str, Factors]) -> tuple[Any, list[mx.array]]:
    parts = {path: factor.arrays() for path, factor in found.items()}
    layout = [(path, found[path].tokens, list(part)) for path, part in parts.items()]
    return layout, [array for part in parts.values() for array in part.values()]


def _unpacked(layout: Any, given: list[mx.array]) -> dict[str, Factors]:
    arrays = iter(given)
    return {
        path: Factors(**{name: next(arrays) for name in names}, tokens=tokens)
        for path, tokens, names in layout or ()
    }
