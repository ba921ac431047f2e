import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import compute_bits_per_weight, dequantize_model
from toy_fixtures import unmeasured
from toy_qwen3 import moe

from mlx_optiq_ext.errors import InputError, OptiqError
from mlx_optiq_ext.model.layers import quantizable
from mlx_optiq_ext.planning.calibration import Calibration, Sampling
from mlx_optiq_ext.weights import Precision, distill, pipeline, put, refine
from mlx_optiq_ext.weights.plan import Plan
from mlx_optiq_ext.weights.precision import quantize
from mlx_optiq_ext.weights.rounding.codes import unpack
from mlx_optiq_ext.weights.rounding.distillation import Distilled, Settings, placed
from mlx_optiq_ext.weights.rounding.distillation.divergence import divergence
from mlx_optiq_ext.weights.rounding.distillation.sequences import divided, drawn, whole
from mlx_optiq_ext.weights.rounding.refinement import judge

pytestmark = pytest.mark.newest

#: A few steps of scales and biases.
SMALL = Settings(steps=8, held_out=4, judged_every=4, codes_rate=0, parameters_rate=0)
#: Such that move codes and norms too.
ALL = replace(SMALL, codes_rate=5e-3, parameters_rate=1e-3, anchor=0.9)


@pytest.fixture
def problem(tiny):
    """The tiny model on sequences of 32 tokens."""
    model, tokenizer = mlx_lm.load(str(tiny))[:2]
    text, sampling = tiny.parent / "calibration.jsonl", Sampling(32, 8, refining=48, beside=0)
    return unmeasured(model, tokenizer, calibration=text, sampling=sampling, effort="refine")


@pytest.fixture
def rounded(problem):
    """Its tensors in 3 bits, as MLX rounds them."""
    precisions = {t.path: Precision(3, 64) for t in problem.tensors}
    return precisions, {path: quantize(problem.weights[path], p) for path, p in precisions.items()}


def judged(problem, precisions, found):
    with placed(problem.model, found.parameters):
        return judge(problem, precisions, found.refined)


def test_distilling_lowers_the_held_out_kl_and_leaves_codes_and_sizes(problem, rounded):
    precisions, start = rounded
    before = {path: mx.array(module.weight) for path, module in quantizable(problem.model)}
    found = distill(problem, precisions, start, SMALL)
    assert judged(problem, precisions, found) < 0.95 * judge(problem, precisions, start)
    assert found.kl < 0.95 * found.kl_before
    assert not found.parameters
    for path, (codes, *grids) in found.refined.items():
        assert mx.array_equal(codes, start[path][0]), path
        for new, old in zip(grids, start[path][1:], strict=True):
            assert (new.shape, new.dtype) == (old.shape, old.dtype)
    for path, module in quantizable(problem.model):
        assert mx.array_equal(module.weight, before[path]), path


@pytest.mark.parametrize("lever", [{"codes_rate": 5e-3, "anchor": 0.9}, {"parameters_rate": 3e-3}])
def test_each_lever_lowers_the_kl_further(problem, rounded, lever):
    without, found = (
        distill(problem, *rounded, settings=settings)
        for settings in (SMALL, replace(SMALL, **lever))
    )
    assert found.kl < 0.98 * without.kl
    assert without.kl_before == pytest.approx(found.kl_before, rel=1e-4)


def test_codes_that_move_stay_codes_of_their_width(problem, rounded):
    precisions, start = rounded
    found = distill(problem, precisions, start, replace(ALL, steps=4))
    moved = 0
    for path, new in found.refined.items():
        shapes = [(a.shape, a.dtype) for a in new]
        assert shapes == [(a.shape, a.dtype) for a in start[path]], path
        codes = unpack(new[0], 3)
        assert int(codes.max()) <= 7
        moved += int((codes != unpack(start[path][0], 3)).sum())
    assert moved > 20


def test_what_is_stored_is_what_was_judged(problem, rounded, tiny):
    precisions, start = rounded
    found = distill(problem, precisions, start, replace(ALL, steps=4, judged_every=1))
    assert found.parameters
    assert any(not mx.array_equal(found.refined[p][0], start[p][0]) for p in start)
    model = mlx_lm.load(str(tiny))[0]
    nn.quantize(model, class_predicate=lambda p, _: p in start and precisions[p].settings)
    put(model, found.refined, found.parameters)
    held_out = mx.array(problem.calibration.held_out)
    kl = divergence(problem.model(held_out), dequantize_model(model)(held_out)).mean()
    assert judged(problem, precisions, found) == pytest.approx(float(kl), rel=0.05)


def test_one_seed_gives_one_result(problem, rounded):
    once, again = (
        distill(problem, *rounded, settings=replace(ALL, steps=3, judged_every=1)) for _ in range(2)
    )
    for path, stored in once.refined.items():
        assert all(
            mx.array_equal(a, b) for a, b in zip(stored, again.refined[path], strict=True)
        ), path
    assert once.parameters
    for path, value in once.parameters.items():
        assert mx.array_equal(value, again.parameters[path]), path


def test_what_is_worse_than_the_start_is_not_returned(problem, rounded):
    found = distill(problem, *rounded, settings=replace(ALL, steps=2, rate=5.0))
    assert found.refined is rounded[1]
    assert not found.parameters
    assert found.kl == found.kl_before


def test_the_best_judgement_is_kept_not_the_last(problem, rounded):
    every, last = (
        distill(problem, *rounded, settings=replace(SMALL, rate=0.04, judged_every=n))
        for n in (1, 8)
    )
    assert every.kl < last.kl
    assert every.steps == last.steps == 8


def test_recomputing_layers_changes_no_value(problem, rounded):
    kept, once = (
        distill(problem, *rounded, settings=replace(ALL, steps=2, checkpoint=c))
        for c in (False, True)
    )
    assert once.kl == pytest.approx(kept.kl, rel=1e-3)
    for path, stored in once.refined.items():
        pairs = zip(stored[1:], kept.refined[path][1:], strict=True)
        assert all(mx.allclose(a, b, rtol=2**-7, atol=1e-4) for a, b in pairs), path


def test_the_time_it_takes_is_said_and_can_be_bounded(problem, rounded):
    said = []
    problem = replace(problem, say=said.append)
    found = distill(
        problem, *rounded, settings=replace(SMALL, steps=10_000, epochs=10_000, seconds=0.5)
    )
    assert 3 <= found.steps < 100
    once = distill(problem, *rounded, settings=replace(SMALL, epochs=1, steps=10_000))
    assert once.steps == -(-len(problem.calibration.refining) // SMALL.rows)
    line = said[0]
    assert f"{found.steps} steps, about " in line


def test_stacked_experts_are_tuned_too(loaded, text):
    problem = unmeasured(moe(), loaded[1], calibration=text, effort="refine")
    precisions = {t.path: Precision(2, 32) for t in problem.tensors}
    start = refine(problem, precisions)
    settings = replace(ALL, steps=3, judged_every=1)
    found = distill(problem, precisions, start, settings).refined
    moved = [p for p in found if "switch_mlp" in p and not mx.array_equal(found[p][1], start[p][1])]
    assert len(moved) == 6


def test_every_source_is_judged_on_and_nothing_that_is_trained_on():
    tokens = np.arange(128, dtype=np.int32).reshape(16, 8)
    more = np.arange(1000, 1096, dtype=np.int32).reshape(12, 8)
    training, held_out = divided(Calibration(tokens, "text", more), Settings(held_out=6))
    assert training.shape == (12 + 12 - 2, 8)
    assert (held_out[4] < 128).all()
    assert (held_out[5] >= 1000).all()
    kept = {tuple(row) for row in training.tolist()}
    assert not kept & {tuple(row) for row in held_out.tolist()}


def test_every_sequence_is_seen_before_any_comes_again():
    batches = drawn(10, 4, seed=0)
    seen = np.concatenate([next(batches) for _ in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert [list(b) for b in whole(5, 3)] == [[0, 1, 2], [3, 4, 0]]


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"rate": -1.0}, {"codes_rate": float("nan")}, {"anchor": 2}, {"seconds": 0}],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(InputError, match="cannot distill"):
        Settings(**wrong)


def test_a_stop_half_way_leaves_the_model_as_it_was(problem, rounded, monkeypatch):
    before = {path: mx.array(module.weight) for path, module in quantizable(problem.model)}

    forward, calls = type(problem.model).__call__, []

    def stop(self, *args):
        calls.append(any(not mx.array_equal(m.weight, before[p]) for p, m in quantizable(self)))
        if calls.count(True) > 3:
            raise KeyboardInterrupt
        return forward(self, *args)

    monkeypatch.setattr(type(problem.model), "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        distill(problem, *rounded, settings=replace(SMALL, checkpoint=False))
    for path, module in quantizable(problem.model):
        assert mx.array_equal(module.weight, before[path]), path


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_only_what_helps_on_held_out_sequences_is_kept(problem, rounded, monkeypatch, factor):
    precisions, start = rounded
    plan = Plan(precisions, {}, "taylor", 3.0, 3.0, kl=1.0)
    norm = {"model.norm.weight": mx.ones((128,))}
    found = Distilled({"tuned": ()}, norm, steps=7)
    monkeypatch.setattr(pipeline, "distill", lambda *args: found)
    monkeypatch.setattr(pipeline, "judge", lambda *args: factor)
    said = []
    problem = replace(problem, say=said.append)
    done = pipeline.distilled(pipeline.Conversion(plan, start), problem, SMALL)
    assert done.post_processing[-1]["kept"] == (factor < 1)
    assert done.post_processing[-1]["steps"] == 7
    assert (done.refined == {"tuned": ()}) == (factor < 1)
    assert (done.parameters == norm) == (factor < 1)
    assert done.plan.kl == min(1.0, factor)
    assert bool(said) == (factor > 1)


def test_tuned_parameters_are_put_in_as_the_model_stores_them(loaded):
    model, value = loaded[0], mx.full((64,), 2.0)
    model.set_dtype(mx.bfloat16)
    path = "model.layers.0.input_layernorm.weight"
    norm = model.layers[0].input_layernorm
    value = mx.full(norm.weight.shape, 2.0)
    put(model, {}, {path: value})
    assert norm.weight.dtype == mx.bfloat16
    assert mx.array_equal(norm.weight, value)
    with pytest.raises(OptiqError, match=r"input_layernorm\.weight was tuned as"):
        put(model, {}, {path: mx.ones((3,))})
    with pytest.raises(OptiqError, match="made nothing of it"):
        put(model, {}, {"model.nowhere.weight": value})


def test_the_command_distills_and_bare_mlx_lm_loads_it(run, toy, text, tmp_path):
    out = tmp_path / "out"
    text.write_text(text.read_text()[:1200])
    source = ("--hf-path", toy, "--optiq-calibration", text, "--optiq-budget", "4")
    run("mlx_lm.convert", *source, "--mlx-path", out, "--optiq-effort", "distill", check=True)
    steps = json.loads((out / "optiq_metadata.json").read_text())["post_processing"]
    assert [step["op"] for step in steps] == ["refine", "distill"]
    assert isinstance(steps[1]["kept"], bool)
    load = f"import mlx_lm; print(mlx_lm.load({str(out)!r})[0].layers[0].mlp.up_proj.bits)"
    assert int(run("python", "-c", load, env={"MLX_OPTIQ_EXT": "0"}, check=True).stdout) >= 2
    assert compute_bits_per_weight(mlx_lm.load(str(out))[0]) <= 4
