"""The part of a pipelined model that one process runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn


@dataclass(frozen=True)
class Stage:
    """Decoder layers of the whole model that this process runs.

    Attributes:
        start: The first one.
        end: One past the last one.
    """

    start: int
    end: int


def stage_of(model: nn.Module) -> Stage | None:
    """This process's stage; None unless ``model.model.pipeline`` split the model."""
    inner: Any = getattr(model, "model", None)
    if not hasattr(inner, "pipeline_size") or inner.end_idx is None:
        return None
    return Stage(inner.start_idx, inner.end_idx)


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Run the block's calls of a pipelined model on this process's layers only.

    Nothing is sent or received, so that an error here leaves no other process waiting. The layers
    get the embeddings in place of another stage's hidden states.
    """
    inner: Any = getattr(model, "model", None)
    if stage_of(model) is None:
        yield
        return
    place = inner.pipeline_rank, inner.pipeline_size
    inner.pipeline_rank, inner.pipeline_size = 0, 1
    try:
        yield
    finally:
        inner.pipeline_rank, inner.pipeline_size = place
