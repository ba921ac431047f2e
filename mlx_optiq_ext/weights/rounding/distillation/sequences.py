"""Batches of calibration sequences, and those kept apart to judge on."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ....planning.calibration import Calibration, cut
from ....planning.generation import generated
from .settings import Settings

#: Sequences sampled at once.
ROWS = 256


def divided(
    calibration: Calibration, more: np.ndarray | None, settings: Settings
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences to train on and sequences to judge on, both of one length.

    Args:
        calibration: Whose held-out sequences are judged on, never trained on.
        more: Further sequences (n, length) of any length, which are cut anew; None for none.
        settings: How many to judge on.

    Returns:
        Two arrays int32 (n, length). Of few sequences, all are trained and judged on.
    """
    training, judged = calibration.refining, calibration.held_out
    if more is not None and more.size:
        others = cut(more.ravel().astype(np.int32), training.shape[1])
        training = np.concatenate([training, others])
    # Every so many sequences, so that each source of text is among them.
    wanted = min(settings.held_out, len(training) // 2) - len(judged)
    if wanted > 0 and calibration.holds_out:
        taken = np.linspace(0, len(training) - 1, wanted).round().astype(int)
        judged = np.concatenate([judged, training[taken]])
        training = np.delete(training, taken, axis=0)
    return training, judged


def drawn(count: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Indices (batch,) below ``count`` without end, each once before any comes again."""
    rng, queue = np.random.default_rng(seed), np.zeros(0, np.int64)
    while True:
        while len(queue) < batch:
            queue = np.concatenate([queue, rng.permutation(count)])
        yield queue[:batch]
        queue = queue[batch:]


def whole(count: int, batch: int) -> list[np.ndarray]:
    """All indices below ``count`` in batches of one size, the first ones once more at the end."""
    return list(np.resize(np.arange(count), (-(-count // batch), batch)))


def sampled_sequences(
    model: Any, tokenizer: Any, count: int, length: int, *, seed: int = 1
) -> np.ndarray:
    """Sequences drawn from a model itself, int32 (count, length).

    Args:
        model: An mlx-lm model.
        tokenizer: Its tokenizer.
        count: How many.
        length: Tokens of each.
        seed: Of the first tokens and of all draws.
    """
    found = []
    for number, first in enumerate(range(0, count, ROWS)):
        rows = min(ROWS, count - first)
        found.append(generated(model, tokenizer, rows, length, seed=seed + number))
    return np.concatenate(found)
