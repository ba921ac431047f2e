"""What queries see of the tokens right before them: keys and values as they were computed.

A query attends to the tokens right before it more than to others. So attention takes these from
exact copies that are kept beside the packed cache, see `last_tokens`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Recent:
    """The last keys, or the last values, as they were computed.

    Number ``m`` stands ``length + count - m`` positions before the cache's end. The last ``length``
    are new. Query ``l`` sees those from ``l + 1`` to ``l + count``, its own token and some before.

    Attributes:
        exact: (batch, heads, count + length, dim), in the stored basis.
        count: Tokens that a query sees as they were computed.
        end: Where a sliding window that got one token ends; older tokens follow there. None for
            behind all tokens.
        floor: Positions at the beginning that belong to other tokens than the next one's.
    """

    exact: mx.array
    count: int
    end: int | None = None
    floor: int = 0

    @property
    def length(self) -> int:
        """New tokens."""
        return self.exact.shape[2] - self.count

    def near(
        self, start: int, stop: int, tokens: int
    ) -> tuple[Sequence[slice], mx.array, mx.array]:
        """What the queries from ``start`` to ``stop`` see.

        Args:
            start: Number of the first query among the new tokens.
            stop: Number behind the last one.
            tokens: Positions in the cache.

        Returns:
            Positions in the cache, whether each query sees each of them as it was computed
            (queries, positions), and what it sees (batch, heads, positions, dim).
        """
        end = (tokens if self.end is None else self.end) - self.length + stop
        at = spans(end, self.floor, tokens, self.count + stop - start - 1)
        own = self.exact[:, :, : stop + self.count]
        own = own[:, :, own.shape[2] - sum(each.stop - each.start for each in at) :]
        if stop - start == 1:
            return at, mx.ones((1, own.shape[2]), mx.bool_), own
        last = mx.arange(stop - start)[:, None] + own.shape[2] - (stop - start)
        back = last - mx.arange(own.shape[2])[None]
        return at, mx.logical_and(back >= 0, back < self.count), own


def spans(end: int, floor: int, tokens: int, count: int) -> Sequence[slice]:
    """Positions of the ``count`` tokens before ``end``, oldest first; fewer if there are fewer.

    Below ``floor`` they go on at the end of the ``tokens``, as in a sliding window.
    """
    front = slice(max(floor, end - count), end)
    back = min(count - (end - front.start), tokens - end)
    return [slice(tokens - back, tokens), front] if back > 0 else [front]


def taken(array: mx.array, at: Sequence[slice], axis: int = -1) -> mx.array:
    """Some positions of an axis."""
    tail = (slice(None),) * (-1 - axis)
    parts = [array[(..., each, *tail)] for each in at]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis)


def replaced(array: mx.array, at: Sequence[slice], part: mx.array) -> mx.array:
    """An array with some positions of its last axis replaced by others in their order."""
    start = part.shape[-1]
    for each in reversed(at):  # the last of them stands first
        stop, start = start, start - (each.stop - each.start)
        parts = [array[..., : each.start], part[..., start:stop], array[..., each.stop :]]
        array = mx.concatenate([each for each in parts if each.shape[-1]], axis=-1)
    return array


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
    if scores.shape[-2] > 1:
        exact = mx.where(sees, exact, taken(scores, at))
    return replaced(scores, at, exact)


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
    near = taken(weights, at)
    if weights.shape[-2] > 1:
        rest, near = mx.where(sees, 0, near), mx.where(sees, near, 0)
    else:
        rest = mx.zeros(near.shape, near.dtype)
    far = weigh(replaced(weights, at, rest))
    return far + (near.astype(own.dtype) @ own[:, :, None]).astype(far.dtype)
