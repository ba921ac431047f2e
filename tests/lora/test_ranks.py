"""Ranks follow a weight, at the parameters of one rank for all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_optiq_ext import OptiqError
from mlx_optiq_ext.lora import allocate
from mlx_optiq_ext.lora.geometry import EXPERTS, LINEAR, Geometry
from mlx_optiq_ext.lora.rank_scaling import BY_BITS, BY_KL, CONSTANT, measured_kl, weights

sizes = st.sampled_from([32, 64, 128, 384, 1024])
layers_ = st.lists(st.tuples(sizes, sizes, st.floats(0.1, 10)), min_size=2, max_size=24)


def linear(inputs=128, outputs=128, bits=4):
    return Geometry(LINEAR, inputs, outputs, 1, bits, 64)


@given(layers_, st.integers(1, 32))
def test_the_budget_is_kept_and_nearly_spent(rows, rank):
    shapes = {str(n): linear(i, o) for n, (i, o, _) in enumerate(rows)}
    weight = {str(n): each for n, (_, _, each) in enumerate(rows)}
    ranks = allocate(shapes, rank, weight)
    spent = sum(ranks[path] * shape.per_rank for path, shape in shapes.items())
    budget = rank * sum(shape.per_rank for shape in shapes.values())
    most = {path: min(shape.inputs, shape.outputs) for path, shape in shapes.items()}
    assert spent <= budget
    assert all(1 <= ranks[path] <= most[path] for path in shapes)
    # Nothing that could still grow fits into what is left.
    growing = [shape.per_rank for path, shape in shapes.items() if ranks[path] < most[path]]
    assert not growing or budget - spent < min(growing)


@given(layers_, st.integers(4, 16))
def test_more_weight_never_means_less_rank(rows, rank):
    shapes = {str(n): linear() for n in range(len(rows))}
    weight = {str(n): each for n, (_, _, each) in enumerate(rows)}
    ranks = allocate(shapes, rank, weight)
    for one in shapes:
        for other in shapes:
            if weight[one] > weight[other]:
                assert ranks[one] >= ranks[other]


def test_by_bits_is_in_proportion():
    shapes = {"a": linear(bits=4), "b": linear(bits=8), "c": linear(bits=4), "d": linear(bits=8)}
    ranks = allocate(shapes, 6, weights(BY_BITS, shapes, {}))
    assert ranks == {"a": 4, "b": 8, "c": 4, "d": 8}


def test_by_kl_follows_the_measured_divergence_around_its_median():
    shapes = {name: linear() for name in "abcde"}
    measured = {"a": 1e-4, "b": 1e-3, "c": 1e-3, "d": 1.0}
    weight = weights(BY_KL, shapes, measured)
    assert weight == {"a": 0.5, "b": 1.0, "c": 1.0, "d": 2.0, "e": 1.0}
    ranks = allocate(shapes, 11, weight)
    assert ranks == {"a": 5, "b": 10, "c": 10, "d": 20, "e": 10}


@pytest.mark.parametrize("scaling", [CONSTANT, BY_BITS, BY_KL])
def test_without_a_difference_the_rank_is_constant(scaling):
    shapes = {name: linear(bits=16) for name in "abc"}
    assert weights(scaling, shapes, {}) is None
    assert allocate(shapes, 5, None) == {"a": 5, "b": 5, "c": 5}


def test_experts_cost_what_they_take():
    shapes = {"experts": Geometry(EXPERTS, 64, 64, 8, 4, 64), "head": linear(64, 64, bits=8)}
    ranks = allocate(shapes, 4, weights(BY_BITS, shapes, {}))
    assert ranks["experts"] == 3
    assert 4 * (8 * 128 + 128) - (ranks["experts"] * 8 * 128 + ranks["head"] * 128) < 128


def test_a_narrow_layer_never_gets_more_than_its_smaller_side():
    shapes = {"router": linear(128, 8, bits=8), "wide": linear(bits=4)}
    assert allocate(shapes, 12, weights(BY_BITS, shapes, {}))["router"] == 8


@pytest.mark.parametrize("rank", [0, 129])
def test_a_rank_that_no_layer_has_is_refused(rank):
    with pytest.raises(OptiqError, match="from 1 to 128"):
        allocate({"model.q_proj": linear()}, rank, None)


def test_published_metadata_names_layers_its_own_way(tmp_path):
    (tmp_path / "optiq_metadata.json").write_text(
        '{"optimization": {"per_layer": {"model.language_model.layers.0.q.weight": {"kl": 0.5},'
        ' "elsewhere": {"kl": 1}, "model.layers.1.q": {"bits": 4}}}}'
    )
    known = {"model.layers.0.q": None, "model.layers.1.q": None}
    assert measured_kl(str(tmp_path), known) == {"model.layers.0.q": 0.5}
    assert measured_kl(str(tmp_path / "none"), known) == {}
    (tmp_path / "optiq_metadata.json").write_text(
        '{"per_layer": {"model.layers.0.q": {"kl": "much"}}}'
    )
    with pytest.raises(OptiqError, match=r"kl of model\.layers\.0\.q"):
        measured_kl(str(tmp_path), known)
