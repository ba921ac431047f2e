"""Whether a model keeps the rows of a batch apart, found out by running it."""

import mlx.core as mx
import mlx.nn as nn

from .. import distributed
from ..errors import OptiqError
from .activation import AdapterActivation, MountedAdapter, Rows
from .mounting import Mounts

#: Enough for mlx-lm's blocks of experts to sort them.
TOKENS = 65


def rows_apart(mounts: Mounts, adapter: MountedAdapter) -> bool:
    """Whether a row of the base model stays what it was beside a row with the adapter.

    Architectures that flatten, sort or transpose their batch in their own way may not.
    """
    tokens = mx.stack([mx.arange(TOKENS) % 7 + shift for shift in (1, 3)])
    try:
        # A rank with layers of its own finds out about those.
        with distributed.apart(mounts.model):
            return _apart(mounts.model, adapter, tokens)
    except OptiqError:
        return False


def _apart(model: nn.Module, adapter: MountedAdapter, tokens: mx.array) -> bool:
    with AdapterActivation(None):
        base = model(tokens).astype(mx.float32)
    for row, rows in enumerate([(None, adapter), (adapter, None)]):
        with AdapterActivation(Rows(rows)):
            mixed = model(tokens).astype(mx.float32)
        allowed = 1e-2 * mx.abs(base[row]).max()
        if (mx.abs(mixed[row] - base[row]) > allowed).any().item():
            return False
    return True
