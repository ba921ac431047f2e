import math

import numpy as np
import pytest

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.weights.targets.certificate import check_sequences, student, upper_bound


@pytest.mark.parametrize(
    ("share", "freedom", "expected"),
    [(0.95, 7, 1.8946), (0.95, 15, 1.7531), (0.95, 31, 1.6955), (0.5, 9, 0.0), (0.9, 20, 1.3253)],
)
def test_quantiles_are_those_of_the_tables(share, freedom, expected):
    assert student(share, freedom) == pytest.approx(expected, rel=2e-3, abs=1e-9)


@pytest.mark.parametrize("count", [16, 32, 64])
@pytest.mark.parametrize("skewed", [False, True])
def test_a_bound_holds_as_often_as_it_says(count, skewed):
    rng = np.random.default_rng(count)
    shape = 2.0 if skewed else 100.0
    held = [shape <= upper_bound(rng.gamma(shape, size=count)) for _ in range(4000)]
    # A hundredth is three standard errors of 4,000 draws, and skew costs up to two.
    assert np.mean(held) > 0.95 - (0.03 if skewed else 0.011)
    wide = [upper_bound(rng.gamma(shape, size=count)) / shape - 1 for _ in range(400)]
    assert np.mean(wide) < 3.2 / math.sqrt(shape * count)


def test_equal_values_bound_themselves():
    assert upper_bound(np.full(9, 0.25)) == 0.25


def test_a_bound_of_few_sequences_is_refused():
    check_sequences(np.zeros((16, 8), np.int32))
    with pytest.raises(InputError, match=r"needs 16 held-out sequences.*there are 15.*more text"):
        check_sequences(np.zeros((15, 8), np.int32))
