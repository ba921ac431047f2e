"""Tests by running a model whether it keeps the rows of a batch independent."""

import mlx.core as mx
import mlx.nn as nn

from .. import distributed
from ..errors import OptiqError
from .activation import AdapterActivation, Rows
from .mixture import MountedAdapter
from .mounting import Mounts

#: Enough for mlx-lm's blocks of experts to sort them.
TOKENS = 65


def rows_apart(mounts: Mounts, adapter: MountedAdapter) -> bool:
    """Whether a row of the base model is unchanged beside a row with the adapter.

    It may not be in architectures that flatten, sort or transpose their batch.
    """
    tokens = mx.stack([mx.arange(TOKENS) % 7 + shift for shift in (1, 3)])
    try:
        # A rank of a pipeline tests its own layers.
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
