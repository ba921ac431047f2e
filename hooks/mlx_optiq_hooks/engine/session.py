"""The stock command that runs: its options, and the state that its wrappers share."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

from mlx_optiq_ext.errors import OptiqError

State = TypeVar("State")


@dataclass
class Session:
    """One run of a stock command's ``main``.

    Attributes:
        command: Name after ``mlx_lm.``.
        options: Parsed ``--optiq-*`` values without their prefix, ours and the plugins'; None if
            none was given.
        facts: What must be equal in every process of ``mlx.launch``: name in messages -> value.
        failure: An error of another thread that ends the command.
    """

    command: str
    options: SimpleNamespace | None = None
    facts: dict[str, str] = field(default_factory=dict)
    failure: OptiqError | None = None
    _states: dict[type, Any] = field(default_factory=dict)

    def keep(self, state: object) -> None:
        """Keep the state of one feature; there is one state of each type."""
        self._states[type(state)] = state

    def state(self, kind: type[State]) -> State | None:
        """The run state of that type, or None if the feature is not in use."""
        return self._states.get(kind)


# A plain stack: the server generates in a thread of its own, which would not see a ContextVar.
_stack: list[Session] = []


def running() -> Session | None:
    """The session of the running command, with or without our options."""
    return _stack[-1] if _stack else None


def current() -> Session | None:
    """The session of the running command, if one runs and was given one of our options."""
    return _stack[-1] if _stack and _stack[-1].options is not None else None


def keep(state: object) -> None:
    """Keep a feature's run state for the running command, if one runs."""
    if _stack:
        _stack[-1].keep(state)


def state(kind: type[State]) -> State | None:
    """The running command's state of one feature, or None."""
    return _stack[-1].state(kind) if _stack else None


@contextmanager
def opened(command: str) -> Iterator[Session]:
    """A session for the duration of a command."""
    entry = Session(command)
    _stack.append(entry)
    try:
        yield entry
    finally:
        _stack.remove(entry)
