import mlx.core as mx
import numpy as np
import pytest

from mlx_optiq_ext.planning.divergence import Reference


def exact(reference, other):
    """KL in float64 over the whole vocabulary."""

    def log_probs(logits):
        logits = np.asarray(logits, np.float64)
        top = logits.max(-1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))

    p, q = log_probs(reference), log_probs(other)
    return (np.exp(p) * (p - q)).sum(-1)


def logits(seed, vocabulary):
    return 3 * mx.random.normal((2, 7, vocabulary), key=mx.random.key(seed))


def test_a_small_vocabulary_is_exact():
    p, q = logits(0, 300), logits(1, 300)
    assert np.array(Reference.of(p).divergence(q)) == pytest.approx(exact(p, q), rel=1e-4)


def test_a_large_vocabulary_is_a_close_lower_bound():
    p = logits(0, 300)
    q = p + 0.1 * logits(1, 300)
    found, true = np.array(Reference.of(p, 200).divergence(q)), exact(p, q)
    assert (found <= true + 1e-5).all()
    assert found.sum() > 0.7 * true.sum()


def test_a_model_does_not_diverge_from_itself():
    p = logits(0, 300)
    assert np.abs(np.array(Reference.of(p, 64).divergence(p))).max() < 1e-5
