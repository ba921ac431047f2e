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
from .stage import Stage, alone, stage_of
from .watch import LIMIT, leave, within

__all__ = [
    "LIMIT",
    "Failed",
    "Mismatch",
    "RankError",
    "Stage",
    "agree",
    "alone",
    "announce",
    "broadcast",
    "first",
    "gathered",
    "handed",
    "leads",
    "leave",
    "rank",
    "share",
    "size",
    "stage_of",
    "summed",
    "together",
    "told",
    "total",
    "within",
]
