"""KL divergence of the final logits against a reference kept as top-k plus log-sum-exp."""

from dataclasses import dataclass

import mlx.core as mx

#: Log-probabilities kept per position; the rest of the vocabulary is lumped into one outcome.
TOP = 1024


@dataclass(frozen=True)
class Reference:
    """A reference distribution for each position of a batch.

    Attributes:
        indices: Kept tokens, (batch, length, k).
        log_probs: Their log-probabilities in float32, (batch, length, k).
        rest: Probability of all other tokens, (batch, length); 0 when all are kept.
    """

    indices: mx.array
    log_probs: mx.array
    rest: mx.array

    @classmethod
    def of(cls, logits: mx.array, top: int = TOP) -> "Reference":
        """Keep the needed part of logits (batch, length, vocabulary).

        Args:
            logits: Logits of the reference model.
            top: Tokens to keep at each position; all tokens if the vocabulary is not larger.
        """
        logits = logits.astype(mx.float32)
        total = mx.logsumexp(logits, axis=-1, keepdims=True)
        vocabulary = logits.shape[-1]
        if vocabulary <= top:
            indices = mx.broadcast_to(mx.arange(vocabulary), logits.shape)
            log_probs, rest = logits - total, mx.zeros(logits.shape[:-1])
        else:
            indices = mx.argpartition(-logits, top, axis=-1)[..., :top]
            log_probs = mx.take_along_axis(logits, indices, axis=-1) - total
            rest = mx.maximum(1 - mx.exp(log_probs).sum(axis=-1), 0)
        reference = cls(indices, log_probs, rest)
        mx.eval(reference.indices, reference.log_probs, reference.rest)
        return reference

    def divergence(self, logits: mx.array) -> mx.array:
        """KL(reference || model) in nats for each position.

        Args:
            logits: (batch, length, vocabulary) of the model to judge.

        Returns:
            float32 (batch, length). Exact when the whole vocabulary is kept, else the divergence
            with the tail as one outcome, which is a lower bound.
        """
        logits = logits.astype(mx.float32)
        total = mx.logsumexp(logits, axis=-1, keepdims=True)
        whole = logits.shape[-1] == self.indices.shape[-1]
        if whole:
            other = logits - total
        else:
            other = mx.take_along_axis(logits, self.indices, axis=-1) - total
        kept = (mx.exp(self.log_probs) * (self.log_probs - other)).sum(axis=-1)
        if whole:
            return kept
        tail = mx.maximum(1 - mx.exp(other).sum(axis=-1), 1e-9)
        rest = mx.maximum(self.rest, 1e-9)
        return kept + rest * (mx.log(rest) - mx.log(tail))
