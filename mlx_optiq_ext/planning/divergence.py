"""KL divergence of the final logits against a reference kept as top-k plus log-sum-exp."""

from dataclasses import dataclass

import mlx.core as mx

from .parts import LayerCall, Parts

#: Log-probabilities kept per position; the rest of the vocabulary is lumped into one outcome.
TOP = 1024


@dataclass(frozen=True)
class Reference:
    """A reference distribution for each position of a batch.

    Attributes:
        indices: Kept tokens, (..., k).
        log_probs: Their log-probabilities in float32, (..., k).
        rest: Probability of all other tokens, (...); 0 when all are kept.
    """

    indices: mx.array
    log_probs: mx.array
    rest: mx.array

    @classmethod
    def of(cls, logits: mx.array, top: int = TOP) -> "Reference":
        """Keep the needed part of logits (..., vocabulary).

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
            logits: (..., vocabulary) of the model to judge.

        Returns:
            float32 (...). Exact when the whole vocabulary is kept, else the divergence
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

    def part(self, start: int, count: int) -> "Reference":
        """That of some of the positions, which are the first axis."""
        at = slice(start, start + count)
        return Reference(self.indices[at], self.log_probs[at], self.rest[at])

    @classmethod
    def run(cls, parts: Parts, tokens: mx.array, layer: LayerCall | None = None) -> "Reference":
        """The distribution of each of a batch's tokens (rows,), with a chunk of logits at a time.

        Args:
            parts: The reference model.
            tokens: int32 (batch, length).
            layer: Runs each layer, if not the layer itself.
        """
        found = []
        for logits in parts.logits(tokens, layer):
            found.append(cls.of(logits))
            del logits
        if len(found) == 1:
            return found[0]
        names = ("indices", "log_probs", "rest")
        whole = cls(*(mx.concatenate([getattr(each, name) for each in found]) for name in names))
        mx.eval(whole.indices, whole.log_probs, whole.rest)
        return whole

    def compared(self, parts: Parts, tokens: mx.array, layer: LayerCall | None = None) -> mx.array:
        """KL(reference || model) in nats for each token, with a chunk of logits at a time.

        Args:
            parts: The model to judge.
            tokens: What `run` was given, int32 (batch, length).
            layer: Runs each layer, if not the layer itself.

        Returns:
            float32 (batch, length); see `divergence`.
        """
        found, start = [], 0
        for logits in parts.logits(tokens, layer):
            found.append(self.part(start, len(logits)).divergence(logits))
            mx.eval(found[-1])
            start += len(logits)
            del logits
        return mx.concatenate(found).reshape(tokens.shape)
