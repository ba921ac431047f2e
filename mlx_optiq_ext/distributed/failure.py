"""What goes wrong between processes."""

from collections.abc import Sequence

from ..errors import OptiqError


class RankError(OptiqError):
    """The processes cannot go on together.

    Attributes:
        shared: Whether every process raises it, so that one of them is enough to print it.
    """

    shared = False


class Failed(RankError):
    """What some processes failed with, raised in all of them.

    Attributes:
        texts: Message of each process's own error; empty for those that have none.
    """

    shared = True

    def __init__(self, texts: Sequence[str]):
        self.texts = list(texts)
        super().__init__(told_apart(texts))


class Mismatch(RankError):
    """The processes do not agree."""

    shared = True


def told_apart(texts: Sequence[str]) -> str:
    """One text if all ranks have the same, else each with the ranks that have it; not the empty."""
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
