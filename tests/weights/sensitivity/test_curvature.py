"""What stands for a second moment costs errors as the moment does."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_optiq_ext.weights.precision import Precision, dequantized
from mlx_optiq_ext.weights.sensitivity.curvature import leading, residual, residuals
from mlx_optiq_ext.weights.sensitivity.moments import Factors


def drawn(rows: int, size: int, seed: int, directions: int | None = None) -> np.ndarray:
    """Inputs (rows, size) with a few strong directions and a mean, or within a few directions."""
    rng = np.random.default_rng(seed)
    inner = directions or size
    strength = np.exp(-np.arange(inner) / 4) + (0 if directions else 0.05)
    turn = np.linalg.qr(rng.normal(size=(size, size)))[0][:inner]
    return (rng.normal(size=(rows, inner)) * strength + 0.3 * strength) @ turn


def second_moment(x: np.ndarray) -> mx.array:
    return mx.array(x.T @ x, mx.float32)


def forms(error: mx.array, moment: mx.array) -> np.ndarray:
    e, m = np.array(error, np.float64), np.array(moment, np.float64)
    return ((e @ m) * e).sum(-1)


@settings(deadline=None, max_examples=30)
@given(
    size=st.sampled_from([8, 31, 64]), rows=st.sampled_from([3, 200]), seed=st.integers(0, 10**6)
)
def test_a_small_moment_is_kept_whole(size, rows, seed):
    moment = second_moment(drawn(rows, size, seed))
    error = mx.random.normal((5, size), key=mx.random.key(seed))
    energy = np.array(leading(moment).energy(error), np.float64)
    assert energy == pytest.approx(forms(error, moment), rel=1e-3)


@settings(deadline=None, max_examples=15)
@given(size=st.sampled_from([96, 160]), directions=st.integers(1, 24), seed=st.integers(0, 10**6))
def test_what_lies_in_a_few_directions_is_kept_whole(size, directions, seed):
    moment = second_moment(drawn(300, size, seed, directions))
    error = mx.random.normal((5, size), key=mx.random.key(seed))
    expected = forms(error, moment)
    energy = np.array(leading(moment).energy(error), np.float64)
    assert np.abs(energy - expected).max() <= 2e-3 * expected.max()


def test_nothing_seen_costs_nothing():
    found = leading(mx.zeros((96, 96)))
    assert np.array(found.energy(mx.ones((2, 96)))) == pytest.approx([0, 0])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_costs_of_a_packing_are_the_exact_ones(bits):
    x = drawn(400, 256, seed=bits)
    weight = mx.random.normal((192, 256), key=mx.random.key(bits))
    error = dequantized(weight, Precision(bits, 64), mx.float32) - weight
    moment, shares = second_moment(x), mx.random.uniform(shape=(192,))
    exact = 0.5 * float((np.array(shares) * forms(error, moment)).sum()) / 400**2
    multiplied = Factors(moment, shares, tokens=400).curvature()
    assert multiplied.kl(error) == pytest.approx(exact, rel=0.03)
    looked_up = Factors(lookups=shares, columns=moment, tokens=400).curvature()
    assert looked_up.kl(error) == pytest.approx(exact, rel=0.03)
    feedback = Factors(moment, shares, tokens=400).curvature(feedback=True)
    assert feedback.kl(error) < exact


@settings(deadline=None, max_examples=15)
@given(
    order=st.lists(st.sampled_from([(8, 0), (8, 1), (12, 0)]), max_size=6),
    damping=st.sampled_from([0.02, 0.5]),
)
def test_moments_are_factored_side_by_side_as_they_are_alone(order, damping):
    moments = [second_moment(drawn(30, size, seed)) for size, seed in order]
    before = [np.array(m) for m in moments]
    found = residuals(moments, damping)
    for moment, kept, one in zip(moments, before, found, strict=True):
        alone = residual(moment, damping).diagonal
        assert np.array_equal(np.array(one.diagonal), np.array(alone))
        assert np.array_equal(np.array(moment), kept)
    assert len({id(one) for one in found}) == len(set(order))


def test_an_error_along_a_strong_direction_is_seen():
    x = drawn(400, 256, seed=0)
    along = np.linalg.svd(x)[2][:1]
    moment, error = second_moment(x), mx.array(along, mx.float32)
    assert float(leading(moment).energy(error)) == pytest.approx(forms(error, moment)[0], rel=0.01)
    assert float((mx.square(error) @ mx.diag(moment))[0]) < 0.5 * forms(error, moment)[0]


def test_error_feedback_leaves_less_than_the_diagonal():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(500, 16)) @ rng.normal(size=(16, 16))
    moment = second_moment(x / 500**0.5)
    left = np.array(residual(moment, damping=0.0).diagonal)
    diagonal = np.diag(np.array(moment))
    assert (left <= diagonal * (1 + 1e-3)).all()
    assert left.sum() < 0.7 * diagonal.sum()
