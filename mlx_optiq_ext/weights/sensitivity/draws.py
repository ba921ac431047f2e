"""Random gradients at the logits, equal for a sequence alone and in its batch."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

#: Bytes of logits in float32 that are differentiated at once on a GPU.
TOGETHER = 2**28


@dataclass(frozen=True)
class Drawn:
    """Calibration sequences of a batch.

    Attributes:
        tokens: int32 (sequences, length).
        batch: Number of the batch.
        row: Where in the batch they start.
        rows: Rows that the batch has.
    """

    tokens: mx.array
    batch: int
    row: int
    rows: int

    def score(self, logits: mx.array, key: mx.array) -> mx.array:
        """The gradients that `score` draws for these rows of the whole batch.

        Args:
            logits: (sequences, length, vocabulary) of these sequences.
            key: Key of the whole batch.
        """
        return score(logits, key, (self.row, self.rows))


def sequences(batches: list[mx.array], together: int = 1) -> list[Drawn]:
    """The calibration sequences of all batches, at most so many of a batch together."""
    return [
        Drawn(batch[row : row + together], number, row, len(batch))
        for number, batch in enumerate(batches)
        for row in range(0, len(batch), together)
    ]


def rows_together(model: nn.Module, batches: list[mx.array]) -> int:
    """How many sequences to differentiate at once: one on a CPU, which gains nothing by more."""
    if mx.default_device() == mx.Device(mx.cpu) or not batches:
        return 1
    return max(1, TOGETHER // (4 * model(batches[0][:1]).size))  # not evaluated


def score(logits: mx.array, key: mx.array, row: tuple[int, int] | None = None) -> mx.array:
    """A random gradient at the logits whose covariance is the KL divergence's Hessian there.

    With probabilities ``p`` the Hessian is ``diag(p) - p p^T``; ``diag(sqrt p) - p sqrt(p)^T``
    times random signs is one draw. Gradients of tokens sampled from the model have the same
    covariance, but where the model is confident nearly all of them are tiny and a few are huge.

    Args:
        logits: (batch, length, vocabulary).
        key: For the draw.
        row: Where in a draw for more rows these start, and how many it has; None for all.

    Returns:
        Of the same shape and dtype.
    """
    probabilities = mx.softmax(logits.astype(mx.float32), axis=-1)
    start, rows = row or (0, len(logits))
    drawn = mx.random.bernoulli(0.5, (rows, *logits.shape[1:]), key=key)
    drawn = drawn[start : start + len(logits)]
    signs = mx.where(drawn, 1.0, -1.0)
    signed = mx.sqrt(probabilities) * signs
    return (signed - probabilities * signed.sum(axis=-1, keepdims=True)).astype(logits.dtype)
