"""The processes that ``mlx.launch`` started, which work on one task together.

In a single process everything here is free and returns its argument::

    from mlx_optiq_ext import distributed

    with distributed.together():
        sizes = distributed.gathered(distributed.rank())
    if distributed.leads():
        print(f"{len(sizes)} processes")
"""

from .agreement import agree, compare, finish, together, told
from .division import collected, led, owners, share, silent, span
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
from .stage import Stage, apart, stage_of
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
    "apart",
    "broadcast",
    "collected",
    "compare",
    "finish",
    "first",
    "gathered",
    "group",
    "handed",
    "leads",
    "leave",
    "led",
    "owners",
    "passed",
    "rank",
    "share",
    "silent",
    "size",
    "span",
    "stage_of",
    "summed",
    "together",
    "told",
    "total",
    "within",
]
