"""What the running stock command was asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


@dataclass
class Session:
    """One run of a stock command's ``main``.

    Attributes:
        command: Name after ``mlx_lm.``.
        options: Parsed ``--optiq-*`` values without their prefix, or None if none was given.
        results: What one wrapper leaves for another, such as the weight plan.
    """

    command: str
    options: SimpleNamespace | None = None
    results: dict[str, Any] = field(default_factory=dict)


# A plain stack: the server generates in a thread of its own, which would not see a ContextVar.
_stack: list[Session] = []


def current() -> Session | None:
    """The session of the running command, if one runs and was given one of our options."""
    return _stack[-1] if _stack and _stack[-1].options is not None else None


def running() -> Session | None:
    """The session of the running command, with or without our options."""
    return _stack[-1] if _stack else None


def planned(entry: Session) -> bool:
    """Whether a session converts by plan."""
    options = entry.options
    return entry.command == "convert" and any(
        getattr(options, name, None) is not None for name in ("budget", "min_tps", "plan")
    )


def text_only(entry: Session) -> bool:
    """Whether a session converts by plan and was not asked to keep other modalities."""
    return planned(entry) and not getattr(entry.options, "keep_unused_modalities", None)


def kv_plan(entry: Session | None) -> Any:
    """The KV plan that a session's command was given, or None."""
    return None if entry is None else getattr(entry.options, "kv_plan", None)


@contextmanager
def session(command: str) -> Iterator[Session]:
    """Open a session for the duration of a command."""
    entry = Session(command)
    _stack.append(entry)
    try:
        yield entry
    finally:
        _stack.remove(entry)
