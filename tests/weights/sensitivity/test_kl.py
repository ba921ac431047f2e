from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.switch_layers import SwitchLinear
from toy_fixtures import unmeasured
from toy_qwen3 import moe

from mlx_optiq_ext.model.layers import quantizable
from mlx_optiq_ext.model.taps import Use, tapped
from mlx_optiq_ext.planning.calibration import Sampling
from mlx_optiq_ext.weights import Precision
from mlx_optiq_ext.weights.candidates import Tensor
from mlx_optiq_ext.weights.sensitivity import kl as module
from mlx_optiq_ext.weights.sensitivity.kl import (
    APART,
    KL,
    NOISE,
    TOLERANCE,
    Probes,
    doubtful,
    guided,
    interpolated,
    measured,
)

PRECISIONS = [Precision(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
ERRORS = {p: 4.0**-p.bits * (1 + p.group_size / 512) for p in PRECISIONS} | {Precision(16, 0): 0.0}


def curve(law):
    """All costs and how many were measured, for a divergence that follows a law of the error."""
    known = {p: law(ERRORS[p]) for p in (Precision(2, 64), Precision(4, 64))}
    while (wanted := doubtful(ERRORS, known)) is not None:
        assert wanted not in known
        known[wanted] = law(ERRORS[wanted])
    return interpolated(ERRORS, known), len(known)


def test_where_the_divergence_is_proportional_two_measurements_give_all_costs():
    costs, measured = curve(lambda error: 0.3 * error)
    assert measured == 2
    assert costs == pytest.approx({p: 0.3 * e for p, e in ERRORS.items()})


def test_where_it_is_not_more_are_measured_until_neighbours_agree():
    costs, measured = curve(lambda error: error**1.5)
    assert 3 <= measured < len(PRECISIONS)
    between = [p for p in PRECISIONS if 2 <= p.bits <= 4 and p.group_size == 64]
    for precision in between:
        assert costs[precision] == pytest.approx(ERRORS[precision] ** 1.5, rel=TOLERANCE)


def test_what_is_below_the_noise_is_not_pursued():
    _, measured = curve(lambda error: NOISE * error**0.1)
    assert measured == 2


@given(st.dictionaries(st.sampled_from(PRECISIONS), st.floats(1e-9, 10), min_size=1))
def test_costs_never_fall_with_a_larger_error(known):
    costs = interpolated(ERRORS, known)
    assert costs[Precision(16, 0)] == 0
    ordered = [costs[p] for p in sorted(ERRORS, key=lambda p: ERRORS[p])]
    assert all(b >= a * (1 - 1e-9) for a, b in pairwise(ordered))


def test_a_tensor_that_quantizes_without_error_costs_nothing():
    assert set(interpolated(dict.fromkeys(PRECISIONS, 0.0), {}).values()) == {0.0}


SHORT = Sampling(length=32)
KINDS = ["q_proj", "experts.0.up", "experts.1.up"]


@given(st.dictionaries(st.sampled_from(KINDS), st.sets(st.integers(0, 90))))
def test_each_tensor_follows_one_of_its_kind_that_is_near(kinds):
    layers = {f"model.layers.{i}.{kind}": i for kind, found in kinds.items() for i in found}
    tensors = [
        Tensor(path, (64, 64), 16, (Precision(4, 64),)) for path in ["embed_tokens", *layers]
    ]
    guides = guided(tensors, layers)
    assert guides.pop("embed_tokens") == "embed_tokens"
    assert guides.keys() == layers.keys()
    for path, guide in guides.items():
        assert guides[guide] == guide
        assert path.split(".")[3:] == guide.split(".")[3:]
    for kind, found in kinds.items():
        leading = {guide for guide in guides.values() if guide.endswith(kind)}
        assert len(leading) == -(-len(found) // APART)


def test_one_measurement_of_a_tensor_tells_its_costs_by_the_curve_of_another(loaded, text):
    calls = []

    class Law(Probes):
        def __call__(self, tensor, precision):
            calls.append(tensor.path)
            size = module.error(self.problem.weights[tensor.path], precision)
            return len(tensor.path) * (size**1.5 if "down" in tensor.path else size)

    problem = unmeasured(*loaded, calibration=text, sampling=SHORT)
    costs = measured(problem, problem.tensors, Law(problem))
    guides = set(guided(problem.tensors, module.layer_index(problem.model)).values())
    assert 3 * len(guides) <= len(calls) < len(problem.tensors) + 4 * len(guides)
    for tensor in problem.tensors:
        for precision in (p for p in tensor.precisions if p.bits in range(2, 5)):
            size = module.error(problem.weights[tensor.path], precision)
            found = costs[tensor.path][precision] / len(tensor.path)
            expected = size**1.5 if "down" in tensor.path else size
            assert found == pytest.approx(expected, rel=2 * TOLERANCE), (tensor.path, precision)


def routing(model, tokens, choice=None):
    """Experts that each layer's tokens go to, with the output of a layer's experts shifted."""
    seen = {}

    def see(use: Use) -> mx.array:
        if use.indices is not None:
            seen[use.path] = np.sort(np.array(use.indices).reshape(-1))
        return use.outputs * 3 if use.path == choice else use.outputs

    modules = {p: m for p, m in quantizable(model) if isinstance(m, SwitchLinear)}
    with tapped(modules, see):
        mx.eval(model(tokens))
    return seen


def test_changed_experts_are_judged_with_the_routing_that_the_reference_took():
    model, tokens = moe(), mx.array([list(range(5, 69))])
    before = routing(model, tokens)
    path = "model.layers.0.mlp.switch_mlp.down_proj"
    after = routing(model, tokens, path)
    first = [p for p in before if p.startswith("model.layers.0.")]
    assert len(first) == 3
    for own in first:
        assert (before[own] == after[own]).all()
    # The next layer sees other inputs, and routes by them as the quantized model will.
    assert any((before[p] != after[p]).any() for p in set(before) - set(first))


def test_stacked_experts_are_measured_as_one_tensor(loaded, text):
    found = KL().measure(unmeasured(moe(), loaded[1], calibration=text, sampling=SHORT))
    experts = [path for path in found if "switch_mlp" in path]
    assert len(experts) == 6
    for path in experts:
        assert found[path][Precision(2, 64)] > found[path][Precision(4, 64)] > 0, path
