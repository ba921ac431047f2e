"""Gradients drawn at the logits, the same for a sequence alone as in its batch."""

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Drawn:
    """One calibration sequence of a batch.

    Attributes:
        tokens: int32 (1, length).
        batch: Number of the batch.
        row: Its row in the batch.
        rows: Rows that the batch has.
    """

    tokens: mx.array
    batch: int
    row: int
    rows: int

    def score(self, logits: mx.array, key: mx.array) -> mx.array:
        """The gradient that `score` draws for this row of the whole batch.

        Args:
            logits: (1, length, vocabulary) of this sequence.
            key: Of the whole batch.
        """
        return score(logits, key, (self.row, self.rows))


def sequences(batches: list[mx.array]) -> list[Drawn]:
    """The calibration sequences of all batches."""
    return [
        Drawn(batch[row : row + 1], number, row, len(batch))
        for number, batch in enumerate(batches)
        for row in range(len(batch))
    ]


def score(logits: mx.array, key: mx.array, row: tuple[int, int] = (0, 1)) -> mx.array:
    """A random gradient at the logits whose covariance is the KL divergence's Hessian there.

    With ``p`` the probabilities that is ``diag(p) - p p^T``, and random signs times
    ``diag(sqrt p) - p sqrt(p)^T`` are one draw. Tokens drawn from the model have the same
    covariance, but where it is sure of itself nearly all of their gradients are next to nothing
    and a few are huge.

    Args:
        logits: (batch, length, vocabulary).
        key: For the draw.
        row: Which part of how many of a draw for more batches these are.

    Returns:
        Of the same shape and dtype.
    """
    probabilities = mx.softmax(logits.astype(mx.float32), axis=-1)
    index, rows = row
    drawn = mx.random.bernoulli(0.5, (rows * len(logits), *logits.shape[1:]), key=key)
    drawn = drawn[index * len(logits) : (index + 1) * len(logits)]
    signs = mx.where(drawn, 1.0, -1.0)
    signed = mx.sqrt(probabilities) * signs
    return (signed - probabilities * signed.sum(axis=-1, keepdims=True)).astype(logits.dtype)
