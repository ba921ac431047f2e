import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_optiq_ext.errors import BudgetError, InputError
from mlx_optiq_ext.planning.allocation import allocate


@st.composite
def problems(draw, tensors=5, candidates=4, unit=1):
    """Costs, sizes and a capacity that the smallest candidates fit."""
    rows = draw(st.lists(st.integers(1, candidates), min_size=1, max_size=tensors))
    cost = st.floats(0, 100, allow_nan=False, width=32)
    size = st.integers(0, 60).map(lambda n: n * unit)
    costs = [[draw(cost) for _ in range(n)] for n in rows]
    sizes = [[draw(size) for _ in range(n)] for n in rows]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    return costs, sizes, draw(st.integers(least, most + 3))


def total(rows, choice):
    return math.fsum(row[c] for row, c in zip(rows, choice, strict=True))


def brute_force(costs, sizes, capacity):
    choices = itertools.product(*(range(len(row)) for row in costs))
    return min(total(costs, c) for c in choices if total(sizes, c) <= capacity)


def greedy(costs, sizes, capacity):
    """Best saving per bit first, one step at a time, from the smallest candidates."""
    choice = [min(range(len(row)), key=lambda c, row=row: row[c]) for row in sizes]
    while True:
        best, gain = None, 0.0
        for t, row in enumerate(costs):
            for c in range(len(row)):
                more = sizes[t][c] - sizes[t][choice[t]]
                saving = row[choice[t]] - row[c]
                if saving > 0 and total(sizes, choice) + more <= capacity:
                    rate = saving / max(more, 1e-9)
                    if rate > gain:
                        best, gain = (t, c), rate
        if best is None:
            return total(costs, choice)
        choice[best[0]] = best[1]


@given(problems())
@settings(max_examples=300, deadline=None)
def test_allocation_is_optimal_against_brute_force(problem):
    costs, sizes, capacity = problem
    choice = allocate(costs, sizes, capacity)
    assert total(sizes, choice) <= capacity
    assert total(costs, choice) == pytest.approx(brute_force(*problem), rel=1e-6, abs=1e-9)


@given(problems(tensors=12, candidates=6, unit=64))
@settings(max_examples=60, deadline=None)
def test_allocation_is_never_worse_than_greedy(problem):
    choice = allocate(*problem)
    assert total(problem[1], choice) <= problem[2]
    assert total(problem[0], choice) <= greedy(*problem) * (1 + 1e-9) + 1e-9


@given(problems(), st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_more_room_never_costs_more(problem, more):
    costs, sizes, capacity = problem
    less_room = total(costs, allocate(costs, sizes, capacity))
    more_room = total(costs, allocate(costs, sizes, capacity + more))
    assert more_room <= less_room + 1e-9 * (1 + less_room)


@given(problems(), st.randoms())
@settings(max_examples=100, deadline=None)
def test_the_order_of_tensors_does_not_matter(problem, random):
    costs, sizes, capacity = problem
    order = list(range(len(costs)))
    random.shuffle(order)
    shuffled = [costs[i] for i in order], [sizes[i] for i in order]
    assert total(shuffled[0], allocate(*shuffled, capacity)) == pytest.approx(
        total(costs, allocate(costs, sizes, capacity)), rel=1e-6, abs=1e-9
    )


@given(problems(tensors=8, candidates=5, unit=7))
@settings(max_examples=60, deadline=None)
def test_a_coarse_table_still_fits_and_beats_greedy(problem):
    choice = allocate(*problem, operations=200)
    assert total(problem[1], choice) <= problem[2]
    assert total(problem[0], choice) >= 0


@given(problems(tensors=8, candidates=6), st.sampled_from([1.0, 1e-300, 1e300]))
@settings(max_examples=100, deadline=None)
def test_ties_equal_sizes_and_extreme_costs_end_and_fit(problem, scale):
    costs, sizes, capacity = problem
    costs = [[round(c / 25) * scale for c in row] for row in costs]
    choice = allocate(costs, sizes, capacity)
    assert total(sizes, choice) <= capacity
    exact = brute_force([[c / scale for c in row] for row in costs], sizes, capacity)
    found = total([[c / scale for c in row] for row in costs], choice)
    assert found == pytest.approx(exact, rel=1e-6, abs=1e-9)


@given(problems(), st.sampled_from([math.nan, math.inf, -math.inf]), st.data())
@settings(max_examples=100, deadline=None)
def test_a_cost_that_is_no_number_is_refused(problem, value, data):
    costs, sizes, capacity = problem
    t = data.draw(st.integers(0, len(costs) - 1))
    c = data.draw(st.integers(0, len(costs[t]) - 1))
    costs[t][c] = value
    with pytest.raises(InputError, match=f"of tensor {t} came out as {value} at candidate {c}:"):
        allocate(costs, sizes, capacity)


@pytest.mark.parametrize("kind", ["real", "ties", "random", "odd sizes"])
def test_a_thousand_tensors_take_a_moment(kind):
    random = np.random.default_rng(0)
    bits = np.linspace(2, 16, 19)
    weights = random.integers(1, 400, 1000)[:, None] * 32768
    sizes = (weights * bits).astype(int)
    costs = {
        "real": 10 ** random.uniform(-6, 0, (1000, 1)) * np.exp(-1.4 * bits),
        "ties": np.tile(np.round(10 * np.exp(-bits)), (1000, 1)),
        "random": random.uniform(0, 1, (1000, 19)),
        "odd sizes": random.uniform(0, 1, (1000, 19)),
    }[kind]
    if kind == "odd sizes":
        sizes = sizes + random.integers(0, 9999, sizes.shape)
    capacity = int(4.5 * weights.sum())
    started = time.perf_counter()
    choice = allocate(costs.tolist(), sizes.tolist(), capacity)
    assert time.perf_counter() - started < 2  # 0.1 s where nothing else runs
    assert total(sizes, choice) <= capacity


def test_what_does_not_fit_is_an_error():
    with pytest.raises(BudgetError, match="take 7 bits of 6"):
        allocate([[1.0], [2.0]], [[3], [4]], 6)


def test_nothing_to_allocate_is_an_empty_choice():
    assert allocate([], [], 10) == []
