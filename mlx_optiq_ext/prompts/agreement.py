"""What the processes that run parts of one model agree on, so that all compute the same tokens."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import mlx.core as mx

from .. import distributed
from .splitting import has_snapshots

T = TypeVar("T")


def longest(find: Callable[[int], tuple[T, int]], most: int) -> tuple[T, int]:
    """The longest prefix of a prompt that every process has; all must ask at the same time.

    Args:
        find: Finds the longest prefix of at most so many tokens: what holds it, and its length.
            With 0 tokens it must find one of length 0.
        most: Tokens of the longest prefix that is of use.
    """
    _settle()
    found, length = find(most)
    while len(set(lengths := distributed.gathered(length))) > 1:
        least = min(lengths)
        if length > least:
            found, length = find(least)
    return found, length


def divides(caches: Sequence[Any]) -> bool:
    """Whether a prompt is computed in parts, because some process needs snapshots of its layers.

    All processes must ask at the same time.
    """
    _settle()
    return any(distributed.gathered(has_snapshots(caches)))


def _settle() -> None:
    """Wait for the token that mlx-lm computes ahead, which also needs the other processes."""
    if distributed.size() == 1:
        return
    from mlx_optiq_compat import symbols

    for stream in (mx.default_stream(mx.default_device()), symbols.generation_stream({})):
        mx.eval(mx.zeros((), stream=stream))
