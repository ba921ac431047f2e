import json
from dataclasses import replace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import compute_bits_per_weight
from toy_fixtures import quiet, unmeasured
from toy_qwen3 import write_toy

from mlx_optiq_ext.errors import BudgetError, InputError, OptiqError
from mlx_optiq_ext.model.layers import quantizable
from mlx_optiq_ext.model.loading import model_digest
from mlx_optiq_ext.planning.journal import Journal
from mlx_optiq_ext.weights import (
    Precision,
    Request,
    plan_folder,
    plan_model,
    search,
    study_model,
)
from mlx_optiq_ext.weights.plan import Plan, Uniform, check_written
from mlx_optiq_ext.weights.sensitivity.kl import KL


def plan(toy, budget, text, **settings):
    return plan_folder(str(toy), quiet(budget=budget, calibration=text, **settings))


@pytest.mark.parametrize("budget", [2.6, 3.5, 4.5, 7.0, 11.0])
def test_the_budget_is_honoured_and_used(toy, text, budget):
    found = plan(toy, budget, text)
    assert budget - 0.02 <= found.achieved_bpw <= budget


def test_the_plan_converts_with_stock_and_takes_what_it_says(toy, text, tmp_path):
    found = plan(toy, 3.7, text)
    out = tmp_path / "out"
    mlx_lm.convert(
        str(toy),
        str(out),
        quantize=True,
        q_group_size=found.default.group_size,
        q_bits=found.default.bits,
        quant_predicate=found.predicate(),
    )
    check_written(out, found)
    model = mlx_lm.load(str(out))[0]
    assert compute_bits_per_weight(model) == pytest.approx(found.achieved_bpw, abs=1e-6)
    modules = dict(quantizable(mlx_lm.load(str(toy))[0]))
    assert set(found.precisions) == set(modules)


def found(toy, text, **settings):
    model, tokenizer = mlx_lm.load(str(toy))[:2]
    return study_model(model, tokenizer, quiet(calibration=text, **settings))


def test_plain_rounding_does_not_choose_what_to_refine(toy, text):
    # Rounded plainly, every other plan is better than the allocated one.
    def measure(_, plans):
        return [np.full((1, 64), 1.0 + (n == 0)) for n in range(len(plans))]

    assert search(found(toy, text, effort="refine"), 4.5, measure=measure).variant == "allocated"
    assert search(found(toy, text), 4.5, measure=measure).variant != "allocated"


def test_a_uniform_quantization_that_is_better_is_taken(toy, text):
    # Last of all comes the smallest one beyond the budget, before it the largest within.
    def measure(_, plans):
        return [np.full((1, 64), kl) for kl in [2.0] * (len(plans) - 2) + [1.0, 0.5]]

    plan = search(found(toy, text), 4.5, measure=measure)
    assert plan.below is not None
    assert plan.above is not None
    assert plan.variant == f"uniform {plan.below.precision}"
    assert set(plan.precisions.values()) == {plan.below.precision}
    assert plan.below.bpw <= 4.5 < plan.above.bpw
    lines = plan.summary().splitlines()
    assert f"plan: uniform {plan.below.precision}" in lines[0]
    assert "held-out text of calibration.txt: 1 nats per token" in lines[1]
    assert "nearest stock uniform below" in lines[2]
    assert "(the plan has 1.00 x that)" in lines[2]
    assert f"above: {plan.above.precision} at {plan.above.bpw:.3f} bits per weight" in lines[3]
    assert "(the plan has 2.00 x that)" in lines[3]


def test_measured_costs_are_the_divergence_of_each_tensor_alone(text, loaded):
    model = loaded[0]
    problem, path = unmeasured(*loaded, calibration=text), "model.layers.1.mlp.down_proj"
    found = KL().measure(problem)
    probe = Precision(2, 64)
    tokens = mx.array(problem.calibration.measured)
    plain = np.array(model(tokens), np.float64)
    with problem.quantized({path: probe}):
        changed = np.array(model(tokens), np.float64)

    def log_probs(logits):
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    p, q = log_probs(plain), log_probs(changed)
    expected = (np.exp(p) * (p - q)).sum(-1).mean()
    assert found[path][probe] == pytest.approx(expected, rel=1e-2)


def test_measuring_leaves_the_model_as_it_was(loaded, text):
    model, tokenizer = loaded
    before = {path: np.array(module.weight) for path, module in quantizable(model)}
    plan_model(model, tokenizer, quiet(budget=4.0, calibration=text))
    for path, module in quantizable(model):
        assert (np.array(module.weight) == before[path]).all()


def test_an_interrupted_sweep_goes_on_where_it_stopped(toy, text, monkeypatch):
    calls = []
    original = Journal.add

    def interrupted(self, key, kl):
        original(self, key, kl)
        if key[0] != "complete":  # the mark that all is known
            calls.append(tuple(key))
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plan(toy, 3.5, text, method="kl")
    resumed = plan(toy, 3.5, text, method="kl")
    assert len(calls) == len(set(calls))
    assert {path for path, *_ in calls} - {"complete"} == set(resumed.precisions)
    monkeypatch.setenv("MLX_OPTIQ_EXT_CACHE", str(text.parent / "elsewhere"))
    calls.extend([("counted", 2, 64)] * 5)
    assert plan(toy, 3.5, text, method="kl").precisions == resumed.precisions


def test_the_digest_follows_every_byte_of_the_weights(toy, tmp_path):
    other = write_toy(tmp_path / "other")
    assert model_digest(other) == model_digest(toy)
    file = other / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert model_digest(other) != model_digest(toy)


def test_an_infeasible_budget_names_the_range(toy, text):
    with pytest.raises(BudgetError, match=r"takes from 2\.\d+ to 16\.000"):
        plan(toy, 1.5, text)


def test_group_sizes_that_no_tensor_allows_are_an_error(tmp_path, text):
    odd = write_toy(tmp_path / "odd")
    found = plan(odd, 15.0, text, group_sizes=(128,))
    assert {path.rpartition(".")[2] for path in found.precisions} == {"down_proj"}
    narrow = write_toy(tmp_path / "narrow", intermediate_size=64)
    with pytest.raises(InputError, match="groups of 128"):
        plan(narrow, 5.0, text, group_sizes=(128,))


def test_a_quantized_source_is_refused(toy, text, tmp_path):
    out = tmp_path / "quantized"
    mlx_lm.convert(str(toy), str(out), quantize=True)
    with pytest.raises(InputError, match="is quantized already"):
        plan(out, 3.5, text)


def test_a_written_folder_that_strays_from_the_plan_is_noticed(toy, text, tmp_path):
    found = plan(toy, 3.7, text)
    out = tmp_path / "uniform"
    mlx_lm.convert(str(toy), str(out), quantize=True)
    with pytest.raises(OptiqError, match="did not follow the plan"):
        check_written(out, found)


def test_a_cut_off_weight_file_is_noticed(toy, text, tmp_path):
    found = plan(toy, 3.7, text)
    out = tmp_path / "cut"
    mlx_lm.convert(
        str(toy), str(out), quantize=True, q_group_size=32, quant_predicate=found.predicate()
    )
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(OptiqError, match="not written completely"):
        check_written(out, found)


def test_the_metadata_holds_every_tensor(toy, text, tmp_path):
    found = plan(toy, 3.7, text)
    found.save(tmp_path)
    written = json.loads((tmp_path / "optiq_metadata.json").read_text())
    assert written["target_bpw"] == 3.7
    assert written["achieved_bpw"] == pytest.approx(found.achieved_bpw, abs=1e-6)
    assert set(written["per_layer"]) == set(found.precisions)
    entry = written["per_layer"]["model.layers.0.mlp.up_proj"]
    assert set(entry) == {"bits", "group_size", "kl"}
    assert {"method", "calibration", "versions", "post_processing"} <= set(written)


def test_a_summary_says_where_the_plan_is_from_and_never_that_it_loses_nothing():
    read = Plan({}, {}, method="read from plan.json", target_bpw=4.1, achieved_bpw=4.1)
    assert "budget" not in read.summary()
    assert "plan read from plan.json" in read.summary()
    nearly = replace(
        read, method="taylor", kl=1e-6, below=Uniform(Precision(4, 64), 4.5, 0.01), target_bpw=4.5
    )
    assert "of a budget of 4.5" in nearly.summary()
    assert "0.0001 x" in nearly.summary()


def test_what_was_measured_before_is_said_to_be_read(toy, text, capsys):
    request = Request(budget=4.5, calibration=text, bits=(3, 4), group_sizes=(64,))
    for begins in ("Measuring", "Reading the measurements of"):
        plan_folder(str(toy), request)
        assert f"[optiq] {begins} " in capsys.readouterr().out
    plan_folder(str(toy), replace(request, bits=(3, 4, 5)))
    assert "[optiq] Measuring " in capsys.readouterr().out
