"""Training in several processes as if it were one."""

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import distributed

#: ``(model, *batch)`` to the mean loss of a batch's tokens and their number.
Loss = Callable[..., tuple[mx.array, mx.array]]


def over_all_tokens(loss: Loss) -> Loss:
    """A loss whose mean over the processes of ``mlx.launch`` is the mean over all of their tokens.

    mlx-lm gives every process's mean the same weight, regardless of its number of tokens. In
    evaluation the loss is unchanged, because mlx-lm weights it correctly.
    """
    if distributed.size() == 1:
        return loss

    def weighted(model: nn.Module, *batch: Any) -> tuple[mx.array, mx.array]:
        value, tokens = loss(model, *batch)
        if not model.training:
            return value, tokens
        every = mx.distributed.all_sum(tokens, group=distributed.group(), stream=mx.cpu)
        return value * (tokens * distributed.size() / every), tokens

    return weighted


def hand_out_start(model: nn.Module) -> None:
    """Give all processes the trainable parameters of rank 0."""
    model.update(distributed.handed(model.trainable_parameters(), 0))


def digest(examples: Iterable[Any]) -> str:
    """Hash of a data set."""
    found = hashlib.sha256()
    for example in examples:
        found.update(json.dumps(example, default=repr, sort_keys=True).encode())
    return found.hexdigest()
