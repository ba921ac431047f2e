"""The processes that ``mlx.launch`` started, which work on one task together.

Alone, everything here is free and hands back what it is given.
"""

from .agreement import agree, compare, finish, together, told
from .division import led, share, silent, span
from .exchange import (
    alone,
    announce,
    broadcast,
    first,
    gathered,
    group,
    handed,
    leads,
    passed,
    rank,
    size,
    summed,
    total,
)
from .failure import Failed, Mismatch, RankError

__all__ = [
    "Failed",
    "Mismatch",
    "RankError",
    "agree",
    "alone",
    "announce",
    "broadcast",
    "compare",
    "finish",
    "first",
    "gathered",
    "group",
    "handed",
    "leads",
    "led",
    "passed",
    "rank",
    "share",
    "silent",
    "size",
    "span",
    "summed",
    "together",
    "told",
    "total",
]
