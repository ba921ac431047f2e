"""KL divergence of whole distributions over the vocabulary, in chunks of tokens."""

from collections.abc import Callable

import mlx.core as mx

#: Makes logits (tokens, vocabulary) of some weights and of rows (tokens, dim).
Head = Callable[[dict[str, mx.array], mx.array], mx.array]


def divergence(reference: mx.array, logits: mx.array) -> mx.array:
    """KL(reference || model) in nats of each row of logits (..., vocabulary), in float32."""
    reference, logits = reference.astype(mx.float32), logits.astype(mx.float32)
    expected = reference - mx.logsumexp(reference, axis=-1, keepdims=True)
    found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return (mx.exp(expected) * (expected - found)).sum(axis=-1)


def chunked(
    target: Callable[[mx.array], mx.array],
    head: Head,
    weights: dict[str, mx.array],
    expected: mx.array,
    hidden: mx.array,
    tokens: int,
    *,
    gradients: bool = True,
    scale: float = 1.0,
) -> tuple[mx.array, dict[str, mx.array], mx.array]:
    """Mean KL of a head's logits, with its gradients, of which no more than a chunk is held.

    Args:
        target: Makes the reference's logits of ``tokens`` rows of ``expected``.
        head: Makes the model's logits.
        weights: That ``head`` takes; gradients are taken with respect to them.
        expected: What the reference's layers returned, (rows, dim).
        hidden: What the model's layers returned, (rows, dim).
        tokens: Rows of a chunk.
        gradients: Whether they are wanted.
        scale: What gradients are multiplied with, lest they vanish in half precision.

    Returns:
        KL in nats a row, its gradients with respect to ``weights`` and to ``hidden``; without
        gradients, ``weights`` and ``hidden`` themselves.
    """

    def loss(
        weights: dict[str, mx.array], hidden: mx.array, expected: mx.array, share: mx.array
    ) -> mx.array:
        return (divergence(target(expected), head(weights, hidden)) * share).sum()

    count = len(hidden)
    share = mx.full((count,), scale / count)
    missing = -count % tokens
    if missing:
        expected, hidden = (mx.pad(a, [(0, missing), (0, 0)]) for a in (expected, hidden))
        share = mx.pad(share, [(0, missing)])
    total, own, slopes, done = mx.array(0.0), {}, [], []
    for start in range(0, count, tokens):
        # One after another: what is evaluated at once is held at once.
        part, wanted = (rows[start : start + tokens] for rows in (hidden, expected))
        if done:
            part, wanted = mx.depends([part, wanted], done)
        others = wanted, share[start : start + tokens]
        if not gradients:
            kl = loss(weights, part, *others)
            total, done = total + kl, [kl]
            continue
        kl, (found, row) = mx.value_and_grad(loss, argnums=(0, 1))(weights, part, *others)
        own = {name: own[name] + g if own else g for name, g in found.items()}
        total = total + kl
        slopes.append(row)
        done = [total, row, *own.values()]
    if not gradients:
        return total / scale, weights, hidden[:count]
    return total / scale, own, mx.concatenate(slopes)[:count]
