"""The processes that ``mlx.launch`` started, which work on one task together.

Alone, everything here is free and hands back what it is given.
"""

from .agreement import agree, together, told
from .exchange import (
    announce,
    broadcast,
    first,
    gathered,
    handed,
    leads,
    rank,
    share,
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
    "announce",
    "broadcast",
    "first",
    "gathered",
    "handed",
    "leads",
    "rank",
    "share",
    "size",
    "summed",
    "together",
    "told",
    "total",
]
