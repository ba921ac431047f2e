"""Keeps the last keys and values of each sequence as they were computed, beside a packed cache.

Where a prompt may be taken up again at the end of a block, those before each such place are kept
too (`Marks`): what is packed cannot be turned back into them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import mlx.core as mx

from ..formats import Format
from .first_keys import joined

#: mlx-lm's caches whose newest tokens can be found.
KEEPING = (
    "BatchKVCache", "BatchRotatingKVCache", "ChunkedKVCache", "ConcatenateKVCache", "KVCache",
    "RotatingKVCache",
)  # fmt: skip


#: Ends of prompts and of their chunks that a sequence remembers, beside ends of blocks.
PROMPTS = 32


class Sides(NamedTuple):
    """Keys and values, or one of them where only that is packed."""

    keys: mx.array | None = None
    values: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """Those that there are."""
        return [side for side in self if side is not None]


@dataclass(frozen=True)
class LastTokens:
    """The last keys and values of a cache's rows, as they were computed.

    Attributes:
        count: Tokens of a row.
        sides: Keys and values, (batch, heads, count, dim) each, in the stored basis; None before
            there are any, and for a side that is not packed. Before a row's first token are zeros.
        ahead: Tokens of each row that are still to come of a prompt padded on the right; None
            without padding.
    """

    count: int
    sides: Sides = field(default_factory=Sides)
    ahead: tuple[int, ...] | None = None

    def with_new(
        self, new: Sequence[mx.array], formats: Sequence[Format | None]
    ) -> tuple["LastTokens", Sides]:
        """With new tokens.

        Args:
            new: New keys and values, (batch, heads, length, dim).
            formats: The format of each.

        Returns:
            The last of all, and known and new ones in a row, (batch, heads, count + length, dim).
        """
        length, wholes = new[0].shape[2], []
        for known, array, format in zip(self.sides, new, formats, strict=True):
            if format is None:
                wholes.append(None)
                continue
            exact = format.turn(array)
            if known is None:
                rows, heads, _, dim = exact.shape
                known = mx.zeros((rows, heads, self.count, dim), exact.dtype)
            wholes.append(mx.concatenate([known, exact], axis=2))
        whole = Sides(*wholes)
        rest = self.ahead and tuple(max(each - length, 0) for each in self.ahead)
        sides = Sides(*(side if side is None else self._last(side, length) for side in whole))
        return replace(self, sides=sides, ahead=rest), whole

    def _last(self, whole: mx.array, length: int) -> mx.array:
        if self.ahead is None:
            last = whole[:, :, length:]
            # A copy: the slice would hold on to the memory of a whole prompt.
            return last if length == 1 else mx.contiguous(last)
        come = mx.array([min(rest, length) for rest in self.ahead])
        at = (come[:, None] + mx.arange(self.count)[None])[:, None, :, None]
        shape = (*whole.shape[:2], self.count, whole.shape[3])
        return mx.take_along_axis(whole, mx.broadcast_to(at, shape), axis=2)

    def rows(self, index: Sequence[int]) -> "LastTokens":
        """Some rows."""
        at = mx.array(list(index), mx.int32)
        sides = Sides(*(None if side is None else side[at] for side in self.sides))
        return replace(self, sides=sides, ahead=self.ahead and tuple(self.ahead[i] for i in index))


def together(caches: Sequence[tuple[LastTokens | None, int]]) -> LastTokens | None:
    """The last tokens of several caches, one behind the other.

    Args:
        caches: Those of each cache, None for an empty one, and its number of rows.
    """
    first = next((last for last, _ in caches if last is not None), None)
    if first is None:
        return None
    sides = Sides(
        *(joined([(last and last.sides[i], rows) for last, rows in caches]) for i in range(2))
    )
    return LastTokens(first.count, sides)


@dataclass(frozen=True)
class Row:
    """What is known of one sequence's last tokens.

    Attributes:
        length: Its tokens.
        exact: Whether the last ones are as they were computed, all of them.
        ends: Length -> the last tokens of that many, (1, heads, count, dim).
        open: Next tokens that may end a prompt, if they come one at a time.
    """

    length: int = 0
    exact: bool = True
    ends: Mapping[int, Sides] = field(default_factory=dict)
    open: int = 2

    def trimmed(self, count: int) -> "Row":
        """Without the last tokens."""
        length = self.length - count
        ends = {place: sides for place, sides in self.ends.items() if place <= length}
        exact = (self.exact and not count) or not length or length in ends
        return Row(length, exact, ends)


@dataclass(frozen=True)
class Marks:
    """The last tokens of each sequence where others may go on: behind blocks and prompts.

    Attributes:
        every: Tokens of a block.
        rows: Of the batch.
    """

    every: int
    rows: tuple[Row, ...]

    def with_new(
        self, whole: Sides, length: int, ahead: tuple[int, ...] | None
    ) -> tuple["Marks", list[mx.array]]:
        """With new tokens, and the arrays that are kept of them.

        Args:
            whole: As `LastTokens.with_new` returns.
            length: New tokens.
            ahead: Of the last tokens before they came.
        """
        rows, new = [], []
        for number, row in enumerate(self.rows):
            stop = row.length + (length if ahead is None else min(ahead[number], length))
            first = (row.length // self.every + 1) * self.every
            places = {*range(first, stop + 1, self.every)}
            if stop > row.length and (length > 1 or row.open):
                places.add(stop)
            if not row.exact:
                places.clear()
            found = {place: _at(whole, number, place - row.length, length) for place in places}
            new += [array for sides in found.values() for array in sides.arrays]
            ends = self._bounded({**row.ends, **found}) if found else row.ends
            rows.append(
                replace(row, length=stop, ends=ends, open=2 if length > 1 else max(row.open - 1, 0))
            )
        return replace(self, rows=tuple(rows)), new

    def _bounded(self, ends: dict[int, Sides]) -> dict[int, Sides]:
        """Without the oldest of many ends of prompts."""
        between = sorted(place for place in ends if place % self.every)
        return {place: ends[place] for place in ends if place not in between[:-PROMPTS]}

    def of(self, index: Sequence[int]) -> "Marks":
        """Those of some rows."""
        return replace(self, rows=tuple(self.rows[number] for number in index))

    def refilled(self) -> "Marks":
        """After the last tokens were unpacked."""
        return replace(self, rows=tuple(replace(row, exact=not row.length) for row in self.rows))

    def trimmed(self, count: int) -> "Marks":
        """Without the last tokens of each row."""
        return replace(self, rows=tuple(row.trimmed(count) for row in self.rows))

    @property
    def arrays(self) -> list[mx.array]:
        """All that is kept."""
        found = [sides for row in self.rows for sides in row.ends.values()]
        return [array for sides in found for array in sides.arrays]


def _at(whole: Sides, row: int, begin: int, length: int) -> Sides:
    def part(side: mx.array | None) -> mx.array | None:
        if side is None:
            return None
        count = side.shape[2] - length
        return mx.contiguous(side[row : row + 1, :, begin : begin + count])

    return Sides(*map(part, whole))


def marks_of(caches: Sequence[tuple[Marks | None, int]]) -> Marks | None:
    """The marks of several caches, one behind the other, as `together`."""
    first = next((marks for marks, _ in caches if marks is not None), None)
    if first is None:
        return None
    unknown = Row(exact=False)
    rows = [marks.rows if marks else (unknown,) * count for marks, count in caches]
    return Marks(first.every, tuple(row for own in rows for row in own))
