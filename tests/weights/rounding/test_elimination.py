from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_optiq_ext.weights.rounding.elimination import blocked, eliminated


def moment_of(size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(3 * size, size)) * np.exp(rng.normal(size=size))
    rows = rows @ (np.eye(size) + rng.normal(size=(size, size)) / size**0.5)
    moment = rows.T @ rows
    return (moment / np.diag(moment).mean() + 0.02 * np.eye(size)).astype(np.float32)


@given(st.integers(1, 5), st.sampled_from([32, 64]), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_the_factors_multiply_to_the_moment_in_the_order_of_rounding(count, size, seed):
    moment = moment_of(size * count, seed)
    found = eliminated(moment, size)
    assert sorted(found.columns.tolist()) == list(range(size * count))
    assert (found.columns.reshape(-1, size) // size == found.groups[:, None]).all()
    assert np.array_equal(found.moment, moment[np.ix_(found.columns, found.columns)])
    assert np.array_equal(found.coupling, np.triu(found.coupling, 1))
    unit = np.eye(len(moment)) + found.coupling
    again = unit * found.variances @ unit.T
    assert np.allclose(again, found.moment, atol=1e-5 * np.abs(moment).max())


def test_the_order_of_rounding_ends_with_the_smallest_variance():
    found = eliminated(np.diag(np.arange(1.0, 65.0, dtype=np.float32)), 32)
    assert found.columns.tolist() == list(range(63, -1, -1))
    assert found.groups.tolist() == [1, 0]


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_the_order_leaves_less_than_the_order_stored(seed):
    moment = moment_of(96, seed)
    stored = np.diag(np.linalg.cholesky(moment[::-1, ::-1].astype(np.float64))) ** 2
    assert eliminated(moment, 32).variances.sum() < 1.001 * stored.sum()


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_blocks_are_coupled_to_other_blocks_only(sizes, seed):
    ends = np.cumsum([0, *sizes])
    blocks = [slice(int(a), int(b)) for a, b in pairwise(ends)]
    moment = moment_of(int(ends[-1]), seed)
    unit = np.eye(len(moment)) + blocked(moment, blocks)
    left = np.linalg.solve(unit, np.linalg.solve(unit, moment).T)
    for at in blocks:
        left[at, at] = 0
    assert np.abs(left).max() < 1e-4 * np.abs(moment).max()
