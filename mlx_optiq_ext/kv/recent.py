"""The last tokens of each sequence, whose keys and values attention sees as they were computed.

A query attends to the tokens right before it more than to others. So these are kept beside the
packed cache too, a few for each row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from .first_keys import joined
from .formats import Format

#: Keys and values, or one of them where only that is packed.
Sides = tuple[mx.array | None, mx.array | None]


@dataclass(frozen=True)
class Recent:
    """The last keys, or the last values, as they were computed.

    Of a cache of ``tokens`` positions, the last ``length`` of which are new, number ``m`` is at
    position ``tokens - length - count + m``, and query ``l`` sees those from ``l + 1`` to
    ``l + count``: its own token's and those before it.

    Attributes:
        exact: (batch, heads, count + length, dim), in the stored basis.
        count: Tokens that a query sees as they were computed.
    """

    exact: mx.array
    count: int

    @property
    def length(self) -> int:
        """New tokens."""
        return self.exact.shape[2] - self.count

    def near(self, start: int, stop: int, tokens: int) -> tuple[slice, mx.array, mx.array]:
        """What the queries from ``start`` to ``stop`` see.

        Returns:
            Positions in the cache, whether each query sees each of them as it was computed
            (queries, positions), and what it sees (batch, heads, positions, dim).
        """
        first = start + 1
        skipped = max(0, self.length + self.count - tokens - first)
        own = self.exact[:, :, first + skipped : stop + self.count]
        begin = tokens - self.length - self.count + first + skipped
        places = mx.arange(skipped, skipped + own.shape[2])[None] - mx.arange(stop - start)[:, None]
        sees = mx.logical_and(places >= 0, places < self.count)
        return slice(begin, begin + own.shape[2]), sees, own


def scores_with(scores: mx.array, queries: mx.array, recent: Recent | None, start: int) -> mx.array:
    """Scores in which the keys near each query are as they were computed.

    Args:
        scores: (batch, heads, repeats, queries, tokens).
        queries: (batch, query heads, queries, dim), scaled, in the stored basis.
        recent: The keys.
        start: Number of the first query among the new tokens.
    """
    if recent is None:
        return scores
    at, sees, own = recent.near(start, start + scores.shape[-2], scores.shape[-1])
    grouped = mx.unflatten(queries.astype(own.dtype), 1, scores.shape[1:3])
    exact = (grouped @ own[:, :, None].swapaxes(-1, -2)).astype(scores.dtype)
    return _replaced(scores, at, mx.where(sees, exact, scores[..., at]))


def outputs_with(
    weigh: Callable[[mx.array], mx.array], weights: mx.array, recent: Recent | None, start: int
) -> mx.array:
    """Outputs for which the values near each query are as they were computed.

    Args:
        weigh: What the packed values make of weights.
        weights: (batch, heads, repeats, queries, tokens).
        recent: The values.
        start: Number of the first query among the new tokens.
    """
    if recent is None:
        return weigh(weights)
    at, sees, own = recent.near(start, start + weights.shape[-2], weights.shape[-1])
    near = weights[..., at]
    far = weigh(_replaced(weights, at, mx.where(sees, 0, near)))
    return far + (mx.where(sees, near, 0).astype(own.dtype) @ own[:, :, None]).astype(far.dtype)


def _replaced(array: mx.array, at: slice, part: mx.array) -> mx.array:
    """An array with some of its last axis replaced."""
    parts = [array[..., : at.start], part, array[..., at.stop :]]
    return mx.concatenate([each for each in parts if each.shape[-1]], axis=-1)


@dataclass(frozen=True)
class LastTokens:
    """The last keys and values of a cache's rows, as they were computed.

    Attributes:
        count: Tokens of a row.
        sides: Keys and values, (batch, heads, count, dim) each, in the stored basis; None before
            there are any, and for a side that is not packed.
        ahead: Tokens of each row that are still to come of a prompt padded on the right.
    """

    count: int
    sides: Sides = (None, None)
    ahead: tuple[int, ...] | None = None

    def updated(
        self,
        new: Sequence[mx.array],
        formats: Sequence[Format | None],
        before: Callable[[int], mx.array | None],
    ) -> tuple["LastTokens", list[Recent | None]]:
        """With new tokens, and what their queries see.

        Args:
            new: New keys and values, (batch, heads, length, dim).
            formats: The format of each.
            before: The last of the packed keys (0) or values (1), at most ``count`` of them, in the
                stored basis, for what is known no more; None if there are none.
        """
        length, seen, sides = new[0].shape[2], [], []
        for number, (array, format) in enumerate(zip(new, formats, strict=True)):
            if format is None or not length:
                seen.append(None)
                sides.append(self.sides[number])
                continue
            exact, known = format.turn(array), self.sides[number]
            if known is None:
                known = self._padded(before(number), exact)
            whole = mx.concatenate([known, exact], axis=2)
            seen.append(Recent(whole, self.count))
            sides.append(self._last(whole, length))
        rest = self.ahead and tuple(max(each - length, 0) for each in self.ahead)
        return replace(self, sides=tuple(sides), ahead=rest), seen

    def _padded(self, known: mx.array | None, like: mx.array) -> mx.array:
        rows, heads, _, dim = like.shape
        found = 0 if known is None else known.shape[2]
        nothing = mx.zeros((rows, heads, self.count - found, dim), like.dtype)
        return nothing if known is None else mx.concatenate([nothing, known], axis=2)

    def _last(self, whole: mx.array, length: int) -> mx.array:
        if self.ahead is None:
            return whole[:, :, length:]
        come = mx.array([min(rest, length) for rest in self.ahead])
        at = (come[:, None] + mx.arange(self.count)[None])[:, None, :, None]
        shape = (*whole.shape[:2], self.count, whole.shape[3])
        return mx.take_along_axis(whole, mx.broadcast_to(at, shape), axis=2)

    def rows(self, index: slice | mx.array) -> "LastTokens":
        """Some rows."""
        keys, values = (None if side is None else side[index] for side in self.sides)
        return replace(self, sides=(keys, values))

    @property
    def arrays(self) -> list[mx.array]:
        """What is kept."""
        return [side for side in self.sides if side is not None]


def together(caches: Sequence[tuple[LastTokens, int]]) -> LastTokens:
    """The last tokens of several caches, one behind the other, with the rows of each."""
    keys, values = (joined([(each.sides[i], rows) for each, rows in caches]) for i in range(2))
    return replace(caches[0][0], sides=(keys, values), ahead=None)
