"""Errors between processes."""

from collections.abc import Sequence

from ..errors import OptiqError


class RankError(OptiqError):
    """The processes cannot go on together.

    Attributes:
        shared: Whether every process raises it, so that one of them is enough to print it.
    """

    shared = False


class Failed(RankError):
    """Errors of some processes, raised in all of them.

    Attributes:
        texts: Each process's own error message; empty if it has none.
    """

    shared = True

    def __init__(self, texts: Sequence[str]):
        self.texts = list(texts)
        super().__init__(told_apart(texts))


class Mismatch(RankError):
    """The processes have different facts."""

    shared = True


def told_apart(texts: Sequence[str]) -> str:
    """One text if all ranks have the same; else each text with its ranks, without empty ones."""
    if len(set(texts)) == 1:
        return texts[0]
    ranks: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        if text:
            ranks.setdefault(text, []).append(number)
    return "; ".join(f"on {named(numbers)}: {text}" for text, numbers in ranks.items())


def named(numbers: Sequence[int]) -> str:
    """``rank 1``, ``ranks 1, 2 and 3``."""
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    *most, last = map(str, numbers)
    return f"ranks {', '.join(most)} and {last}"
