"""The texts that an adapter is trained on."""

from collections.abc import Sequence
from typing import Any

from .. import distributed
from ..model.hub import cached_folder
from ..model.loading import model_digest
from .averaging import digest

#: How many training texts weight the residual, and how many tokens of each.
SAMPLES, LENGTH = 16, 512


def samples(dataset: Any, max_seq_length: int = LENGTH) -> list[list[int]]:
    """Tokens of some training texts, spread over the data set.

    Args:
        dataset: One of ``mlx_lm.tuner.datasets``.
        max_seq_length: Tokens that the training reads of a text at most.

    Returns:
        The tokens of up to `SAMPLES` texts, up to `LENGTH` of each; none is empty.
    """
    from mlx_lm.tuner.datasets import CacheDataset

    cached = CacheDataset(dataset)
    step = max(1, len(cached) // SAMPLES)
    found: list[list[int]] = []
    for index in range(0, len(cached), step)[:SAMPLES]:
        item: Any = cached[index]
        tokens = item[0] if len(item) == 2 else item
        found.append(list(tokens)[: min(LENGTH, max_seq_length)])
    return [tokens for tokens in found if tokens]


def check_same_start(model: str, training: Sequence[Any], validation: Sequence[Any]) -> None:
    """Check that every process trains the same model on the same data.

    Args:
        model: The base model's folder or name.
        training: Examples to train on.
        validation: Examples to judge by.

    Raises:
        Mismatch: They differ; the message says which process has what.
    """
    if distributed.size() == 1:
        return
    sets = {"training data": training, "validation data": validation}
    digests = {name: digest(each[i] for i in range(len(each))) for name, each in sets.items()}
    distributed.compare(model=model_digest(cached_folder(model)), **digests)
