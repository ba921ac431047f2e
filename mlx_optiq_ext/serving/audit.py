"""What a server says of itself: what is on at its start, and who changed it."""

import json
from collections.abc import Iterator

from .guard import Guard
from .metrics import METRICS

#: Characters of a value that a client chose.
LONGEST = 120


def record(action: str, **fields: str | int | None) -> str:
    """One line about a change, with its fields as a JSON object.

    Args:
        action: ``load`` or ``unload``.
        fields: What is known. Texts are cut, and cannot end the line.
    """
    known = {"action": action} | {
        name: value if value is None or isinstance(value, int) else _cut(value)
        for name, value in fields.items()
    }
    # JSON escapes all control characters but this one.
    return "audit: " + json.dumps(known).replace("\x7f", "\\u007f")


def described(guard: Guard, port: int, *, metrics: bool = False) -> Iterator[str]:
    """Lines about what a server with these rules does.

    Args:
        guard: The rules.
        port: Where it listens.
        metrics: Whether it has `METRICS`.
    """
    limits = guard.limits
    yield f"listening at {guard.host}:{port}"
    if guard.keys is not None:
        yield f"keys: {len(guard.keys)}, asked for by all but /health"
    yield (
        f"limits: {limits.connections} connections, {limits.body:,} bytes a request, "
        f"{limits.patience:g} s for a client"
    )
    if guard.own_pages:
        yield "web pages: only those of this host may read (a key or --allowed-origins lets others)"
    if metrics:
        yield f"metrics: {METRICS}"


def _cut(value: str) -> str:
    return value if len(value) <= LONGEST else f"{value[:LONGEST]}..."
