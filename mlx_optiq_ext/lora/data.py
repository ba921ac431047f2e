"""The texts that an adapter is trained on."""

from collections.abc import Sequence
from typing import Any

from .. import distributed
from ..errors import InputError
from ..model.hub import cached_folder
from ..model.loading import model_digest
from .averaging import digest

#: Number of training texts that weight the residual, and tokens of each.
SAMPLES, LENGTH = 16, 512


def samples(dataset: Any, max_seq_length: int = LENGTH) -> list[list[int]]:
    """Tokens of some training texts, spread over the data set.

    Args:
        dataset: One of ``mlx_lm.tuner.datasets``.
        max_seq_length: Most tokens of a text that the training reads.

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


def check_trained_tokens(dataset: Any, batch_size: int, max_seq_length: int) -> None:
    """Check that every batch has a token to train on where prompts are masked.

    Args:
        dataset: Examples as mlx-lm's trainer gets them, ``(tokens, length of the prompt)``.
        batch_size: Examples of a batch, over all processes.
        max_seq_length: Most tokens of an example that the training reads.

    Raises:
        InputError: A batch has no token to train on.
    """
    if not len(dataset) or len(dataset[0]) != 2 or not dataset[0][1]:
        return
    # mlx-lm's batches: examples sorted by length, divided among the processes.
    length = getattr(dataset, "itemlen", lambda index: len(dataset[index][0]))
    order = sorted(range(len(dataset)), key=length)
    without = set()
    for index in order:
        tokens, prompt = dataset[index]
        if max(prompt, 1) >= min(len(tokens), max_seq_length):
            without.add(index)
    share = max(1, batch_size // distributed.size())
    starts = range(0, len(order) - batch_size + 1, batch_size)
    for start in starts if without else ():
        batch = order[start : start + batch_size]
        for first in range(batch_size // share):
            if without.issuperset(batch[first :: batch_size // share]):
                raise InputError(
                    f"--mask-prompt leaves no token to train on in {len(without)} of "
                    f"{len(dataset)} examples, and in a whole batch: their prompts fill "
                    f"--max-seq-length {max_seq_length} or have no completion; raise it, or take "
                    "those examples out"
                )


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
