import importlib
from dataclasses import replace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from toy_fixtures import quiet, without_gradients

from mlx_optiq_ext.model.layers import quantizable
from mlx_optiq_ext.planning.calibration import Sampling
from mlx_optiq_ext.weights import Precision, search, study_model
from mlx_optiq_ext.weights.plan_search import PROTECTED, rules
from mlx_optiq_ext.weights.sensitivity.interaction import SHARES, around
from mlx_optiq_ext.weights.sensitivity.problem import Findings, divergences, end_to_end

pytestmark = pytest.mark.newest

module = importlib.import_module("mlx_optiq_ext.weights.plan_search")


@pytest.fixture
def study(tiny):
    """The tiny model measured on a few hundred tokens."""
    model, tokenizer = mlx_lm.load(str(tiny))[:2]
    text = tiny.parent / "calibration.jsonl"
    sampling = Sampling(length=64, count=8)
    request = quiet(calibration=text, sampling=sampling, bits=(2, 3, 8))
    return study_model(model, tokenizer, request)


def factors(study, precisions):
    """By how much each tensor's costs change around a plan, at full share."""
    costs = around(study.problem, study.sensitivity, precisions)[SHARES.index(1.0)]
    before, result = study.sensitivity, {}
    for path, row in costs.items():
        quotients = [cost / before[path][p] for p, cost in row.items() if cost > 0]
        assert quotients == pytest.approx([quotients[0]] * len(quotients))
        result[path] = quotients[0]
    return result


def test_a_coarse_plan_moves_the_costs_more_than_a_nearly_lossless_one(study):
    def moved(precision):
        found = factors(study, {t.path: precision for t in study.problem.tensors})
        return np.median(np.abs(np.log(list(found.values()))))

    # Labels are drawn anew, so that even the lossless plan moves them a little.
    assert moved(Precision(2, 64)) > 2 * moved(Precision(8, 32))


def test_measuring_around_a_plan_leaves_the_model_as_it_was(study):
    modules = quantizable(study.problem.model)
    before = {path: mx.array(module.weight) for path, module in modules}
    around(study.problem, study.sensitivity, {path: Precision(2, 64) for path in before})
    for path, module in modules:
        assert module.weight.dtype == before[path].dtype
        assert mx.array_equal(module.weight, before[path]), path


def forgetting(study):
    """The study without the plans that were judged before."""
    return replace(study, problem=replace(study.problem, findings=Findings()))


def test_the_second_round_is_kept_only_if_it_lowers_the_divergence(study, monkeypatch):
    first = search(study, 3.0, remeasure_below=0.0)
    both = search(forgetting(study), 3.0)
    assert both.kl is not None
    assert first.kl is not None
    assert both.kl <= first.kl
    assert both.achieved_bpw <= 3.0
    assert end_to_end(study.problem, [both.precisions]) == pytest.approx([both.kl])
    worse = {p: {q: -c for q, c in row.items()} for p, row in study.sensitivity.items()}
    monkeypatch.setattr(module, "around", lambda *_: [worse])
    assert search(forgetting(study), 3.0).precisions == first.precisions


def test_the_second_round_keeps_both_ends_protected(study):
    tried = []

    def watched(problem, choices):
        tried.extend(choices)
        return divergences(problem, choices)

    plan = search(study, 5.0, protect=True, remeasure_below=6.0, measure=watched)
    allowed = rules(study.problem)[PROTECTED]
    assert plan.variant.startswith(PROTECTED)
    planned = [choice for choice in tried if len(set(choice.values())) > 1]  # the others: stock's
    assert len(planned) > 1
    for choice in planned:
        assert all(allowed(t, choice[t.path]) for t in study.problem.tensors)


def test_a_budget_of_four_bits_gets_no_second_round(study, monkeypatch):
    monkeypatch.setattr(module, "around", lambda *_: pytest.fail("a second round"))
    assert "re-measured" not in search(study, 4.0).variant


def test_a_model_without_gradients_gets_no_second_round_and_its_plan_says_so(study, monkeypatch):
    without_gradients(monkeypatch)
    plan = search(study, 3.0)
    assert "re-measured" not in plan.variant
    (note,) = plan.notes
    assert "VJP not implemented for scatter_prod): no second round of plans" in note


def test_memory_that_runs_out_is_no_missing_gradient(study, monkeypatch):
    without_gradients(monkeypatch, "[malloc] Unable to allocate 1000000 bytes.")
    with pytest.raises(RuntimeError, match="Unable to allocate"):
        search(study, 3.0)
