import math

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_fixtures import unmeasured

from mlx_optiq_ext.planning.calibration import Sampling
from mlx_optiq_ext.weights.candidates import Tensor
from mlx_optiq_ext.weights.precision import Precision
from mlx_optiq_ext.weights.sensitivity.moments import Factors
from mlx_optiq_ext.weights.sensitivity.remainder import (
    LARGEST,
    Remainder,
    remainders,
    some_columns,
)
from mlx_optiq_ext.weights.sensitivity.taylor import Taylor

ALL = tuple(Precision(bits, group) for bits in (2, 3, 4, 8) for group in (32, 64))


def tensor(path: str, *shape: int, precisions=ALL) -> Tensor:
    return Tensor(path, shape, 16, precisions)


def factors(size: int, outputs: int, outlier: float = 1.0, seed: int = 0) -> Factors:
    """Of correlated inputs, the fifth of which is larger than the others."""
    keys = mx.random.split(mx.random.key(seed), 3)
    rows = mx.random.normal((512, size), key=keys[0])
    rows = rows + mx.random.normal((512, 1), key=keys[1])
    rows[:, 5] *= outlier
    weights = mx.random.uniform(0.5, 1.5, (outputs,), key=keys[2])
    return Factors(inputs=rows.T @ rows, outputs=weights, tokens=512)


def weight(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(9)).astype(mx.bfloat16)


def test_what_is_usual_is_kept_and_what_is_less_is_interpolated_on_a_log_scale():
    known = Remainder({2: 0.05, 4: 0.2})
    expected = [0.1, 0.1, 0.2, 0.4, 0.4]
    assert [known.correction(bits) for bits in (1, 2, 3, 4, 8)] == pytest.approx(expected)
    assert Remainder({2: 0.45, 4: 0.7}).correction(4) == 1.0
    assert Remainder({}).correction(4) == 1.0


def test_a_large_input_leaves_less_than_the_moments_predict():
    """The weights of outlier inputs are kept by order and range, which the moments do not know."""
    values = {"plain": weight(96, 128), "outlier": weight(96, 128)}
    found = {"plain": factors(128, 96), "outlier": factors(128, 96, outlier=200.0)}
    left = remainders(values, [tensor(path, 96, 128) for path in values], found)
    for bits in (2, 4):
        assert 0.2 < left["plain"].shares[bits] < 0.9
        assert left["outlier"].shares[bits] < left["plain"].shares[bits] / 3


def test_some_rows_and_columns_tell_what_all_leave():
    values, found = {"w": weight(256, 1024)}, {"w": factors(1024, 256, outlier=50.0)}
    tensors = [tensor("w", 256, 1024)]
    whole = remainders(values, tensors, found, rows=256)["w"]
    rows = remainders(values, tensors, found, rows=48)["w"]
    columns = remainders(values, tensors, found, rows=48, columns=512)["w"]
    for bits in (2, 4):
        assert rows.shares[bits] == pytest.approx(whole.shares[bits], rel=0.1)
        assert columns.shares[bits] == pytest.approx(whole.shares[bits], rel=0.3)


def test_of_experts_nothing_is_known_and_without_rows_of_nothing():
    values = {"dense": weight(64, 64), "experts": weight(4, 32, 64)}
    stack = Factors(inputs=mx.ones((4, 64)), outputs=mx.ones((4, 32)), uses=mx.ones(4), tokens=512)
    found = {"dense": factors(64, 64), "experts": stack}
    tensors = [tensor("dense", 64, 64), tensor("experts", 4, 32, 64)]
    left = remainders(values, tensors, found)
    assert left["dense"].shares
    assert not left["experts"].shares
    assert all(not each.shares for each in remainders(values, tensors, found, rows=0).values())


def test_what_has_no_error_or_no_affine_candidate_is_left_as_predicted():
    values = {"zero": mx.zeros((64, 64)), "other": weight(64, 64)}
    found = {path: factors(64, 64) for path in values}
    own = (Precision(4, 16, "nvfp4"),)
    tensors = [tensor("zero", 64, 64), tensor("other", 64, 64, precisions=own)]
    left = remainders(values, tensors, found)
    assert [left[path].shares for path in values] == [{}, {}]


def test_a_tied_embedding_is_measured_in_both_of_its_roles():
    found, values = factors(64, 128), {"e": weight(128, 64)}
    lookups, columns = mx.ones(128), factors(64, 128, seed=3).inputs
    tied = Factors(found.inputs, found.outputs, None, lookups, columns, None, 512)
    untied = Factors(None, None, None, lookups, columns, None, 512)
    shares = [
        remainders(values, [tensor("e", 128, 64)], {"e": each})["e"].shares[4]
        for each in (tied, untied)
    ]
    assert min(shares) > 0.2
    assert max(shares) < 0.95
    assert not math.isclose(*shares)


@given(
    st.integers(5, 40), st.integers(2, 3), st.sampled_from([32, 64, 128]), st.integers(0, 2**32 - 1)
)
def test_columns_stand_for_all_and_the_largest_for_themselves(units, times, unit, seed):
    energy = np.random.default_rng(seed).exponential(size=units * unit)
    most = times * LARGEST * unit
    at, stands = some_columns(energy, unit, most)
    assert len(at) <= max(most, unit * (LARGEST + 1))
    assert stands.sum() == pytest.approx(len(energy))
    assert (at.reshape(-1, unit) == at[::unit, None] + np.arange(unit)).all()
    assert (at[::unit] % unit == 0).all()
    largest = energy.reshape(units, unit).sum(axis=1).argmax() * unit
    assert stands[at == largest] == 1.0


@pytest.mark.newest
@pytest.mark.parametrize("effort", ["plan", "refine"])
def test_taylor_expects_what_refinement_leaves(tiny, effort):
    model, tokenizer = mlx_lm.load(str(tiny))[:2]
    text, sampling = tiny.parent / "calibration.jsonl", Sampling(length=64, count=4, refining=8)
    settings = {"calibration": text, "sampling": sampling, "bits": (2, 4), "effort": effort}
    problem = unmeasured(model, tokenizer, **settings)
    measured, predicted = (Taylor(rows=rows).measure(problem) for rows in (32, 0))
    ratios = [
        kl / predicted[path][precision]
        for path, costs in measured.items()
        for precision, kl in costs.items()
    ]
    if effort == "plan":
        assert set(ratios) == {1.0}
    else:
        assert 0.1 < min(ratios) < 1 >= max(ratios)
