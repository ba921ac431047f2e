"""Gradients drawn at the logits, each window's as its batch has them."""

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Window:
    """One window of a batch.

    Attributes:
        tokens: int32 (1, length).
        batch: Number of its batch.
        row: Its row there.
        rows: How many the batch has.
    """

    tokens: mx.array
    batch: int
    row: int
    rows: int

    def score(self, logits: mx.array, key: mx.array) -> mx.array:
        """Its row of what `score` draws for the whole batch; ``logits`` are the window's."""
        return score(logits, key, (self.row, self.rows))


def windows(batches: list[mx.array]) -> list[Window]:
    """The windows of all batches."""
    return [
        Window(batch[row : row + 1], number, row, len(batch))
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
