"""Batches of calibration sequences, and those kept apart to judge on."""

from collections.abc import Iterator

import numpy as np

from ....planning.calibration import Calibration
from .settings import Settings


def divided(calibration: Calibration, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Sequences to train on and sequences to judge on, both of one length.

    Args:
        calibration: Whose held-out sequences are judged on, never trained on.
        settings: How many to judge on.

    Returns:
        Two arrays int32 (n, length). Of few sequences, all are trained and judged on.
    """
    training, judged = calibration.distilling, calibration.held_out
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
