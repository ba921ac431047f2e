"""Makes sure that all processes start from the same facts and end with the same error."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .._version import versions
from ..errors import OptiqError
from .exchange import REMEDY, announce, gathered, group, leads, rank, size
from .failure import Failed, Mismatch, RankError, named
from .watch import LIMIT, within


def agree(limit: float = LIMIT, /, **facts: Any) -> None:
    """Check that all processes have the same facts and versions; they must ask at the same time.

    Args:
        limit: Seconds that the others have to answer.
        facts: Values to compare, by their names in messages.

    Raises:
        Mismatch: In every process, naming the first fact that differs and who has which.
    """
    if size() == 1:
        return
    with within(limit, lambda: f"rank {rank()} got no answer within {limit:.0f} s: {REMEDY}"):
        compare(**versions(), **{name: repr(value) for name, value in facts.items()})


def compare(**facts: str | None) -> None:
    """Check that all processes have the same facts, without a time limit.

    Raises:
        Mismatch: In every process, naming the first fact that differs and who has which.
    """
    every = gathered(facts)
    for name in dict.fromkeys(name for own in every for name in own):
        owners: dict[str | None, list[int]] = {}
        for number, own in enumerate(every):
            owners.setdefault(own.get(name, "nothing"), []).append(number)
        if len(owners) > 1:
            values = ", ".join(f"{value} on {named(numbers)}" for value, numbers in owners.items())
            raise Mismatch(f"the ranks do not have the same {name}: {values}; make them equal")


@contextmanager
def together() -> Iterator[None]:
    """An error inside that ends one process ends all of them.

    A process that fails inside tells the others at their next exchange, and they raise the same.

    Raises:
        RankError: Something failed here or in another process.
    """
    try:
        yield
    except RankError:
        raise  # the others know it already, or are gone
    except Exception as error:
        if not started() or size() == 1:
            raise
        own = isinstance(error, OptiqError)
        text = str(error) if own else f"{type(error).__name__}: {error}"
        try:
            announce(text)
        except Failed as failed:
            if own or (not leads() and set(failed.texts) == {text}):
                raise failed from error
        raise  # an unexpected error keeps its traceback


def started() -> bool:
    """Whether the processes have worked together yet."""
    return group.cache_info().currsize > 0


def finish() -> None:
    """Wait for all processes, so that none leaves before the last one succeeds."""
    if started():
        gathered(None)


def told(error: BaseException) -> bool:
    """Whether another process prints an error, so that this one need not."""
    return isinstance(error, RankError) and error.shared and not leads()
