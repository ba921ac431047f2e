import json
from dataclasses import replace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import compute_bits_per_weight
from toy_fixtures import unmeasured
from toy_qwen3 import moe

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.model.layers import quantizable
from mlx_optiq_ext.planning.calibration import Sampling
from mlx_optiq_ext.weights import (
    Precision,
    distill,
    refine,
)
from mlx_optiq_ext.weights import (
    pipeline as conversion,
)
from mlx_optiq_ext.weights.plan import Plan
from mlx_optiq_ext.weights.precision import quantize
from mlx_optiq_ext.weights.rounding import distillation
from mlx_optiq_ext.weights.rounding.refinement import judge
from mlx_optiq_ext.weights.sensitivity.problem import batches

pytestmark = pytest.mark.newest


@pytest.fixture
def problem(tiny):
    """The tiny model on sequences of 64 tokens."""
    model, tokenizer = mlx_lm.load(str(tiny))[:2]
    text, sampling = tiny.parent / "calibration.jsonl", Sampling(length=64, count=8, refining=48)
    return unmeasured(model, tokenizer, calibration=text, sampling=sampling, refine=True)


@pytest.fixture
def rounded(problem):
    """Its tensors in 2 bits, as MLX rounds them."""
    precisions = {t.path: Precision(2, 64) for t in problem.tensors}
    return precisions, {path: quantize(problem.weights[path], p) for path, p in precisions.items()}


def test_distilling_lowers_the_held_out_kl_and_leaves_codes_and_sizes(problem, rounded):
    precisions, start = rounded
    before = {path: mx.array(module.weight) for path, module in quantizable(problem.model)}
    tuned = distill(problem, precisions, start, steps=16)
    assert judge(problem, precisions, tuned) < 0.95 * judge(problem, precisions, start)
    for path, (codes, *grids) in tuned.items():
        assert mx.array_equal(codes, start[path][0]), path
        for new, old in zip(grids, start[path][1:], strict=True):
            assert (new.shape, new.dtype) == (old.shape, old.dtype)
    for path, module in quantizable(problem.model):
        assert mx.array_equal(module.weight, before[path]), path


def test_a_step_of_no_size_changes_nothing_but_rounding(problem, rounded):
    precisions, start = rounded
    tuned = distill(problem, precisions, start, steps=1, rate=1e-12)
    for path, packed in tuned.items():
        for new, old in zip(packed, start[path], strict=True):
            assert mx.allclose(new, old, rtol=2**-7, atol=1e-3), path


def test_recomputing_layers_changes_no_value(problem, rounded):
    once = distill(problem, *rounded, steps=2)
    whole = distill(problem, *rounded, steps=2, checkpoint=False)
    for path, packed in once.items():
        assert all(mx.allclose(a, b, rtol=2**-7) for a, b in zip(packed, whole[path], strict=True))


def test_layers_that_cannot_be_recorded_are_tuned_in_one_piece(problem, rounded, monkeypatch):
    start = rounded[1]
    monkeypatch.setattr(distillation, "record", lambda model, tokens: (None, []))
    tuned = distill(problem, *rounded, steps=2)
    assert not any(mx.array_equal(tuned[path][1], start[path][1]) for path in start)


def test_stacked_experts_are_tuned_too(loaded, text):
    problem = unmeasured(moe(), loaded[1], calibration=text, refine=True)
    precisions = {t.path: Precision(2, 32) for t in problem.tensors}
    start = refine(problem, precisions)
    tuned = distill(problem, precisions, start, steps=4)
    moved = [p for p in tuned if "switch_mlp" in p and not mx.array_equal(tuned[p][1], start[p][1])]
    assert len(moved) == 6


def test_every_window_is_seen_before_any_comes_again(problem):
    windows = problem.calibration.refining
    drawn = distillation._drawn(windows)
    count = len(batches(windows))
    seen = [tuple(row) for _ in range(count) for row in np.array(next(drawn))]
    whole = {tuple(row) for row in windows.tolist()}
    assert len(set(seen[: len(windows)])) == len(whole)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"rate": 0.0}, {"rate": float("nan")}])
def test_wrong_settings_are_refused(problem, rounded, wrong):
    with pytest.raises(InputError, match="at least one step and a rate above 0"):
        distill(problem, *rounded, **wrong)


def test_a_stop_half_way_leaves_the_model_as_it_was(problem, rounded, monkeypatch):
    before = {path: mx.array(module.weight) for path, module in quantizable(problem.model)}

    forward, calls = type(problem.model).__call__, []

    def stop(self, *args):
        calls.append(any(not mx.array_equal(m.weight, before[p]) for p, m in quantizable(self)))
        if calls.count(True):
            raise KeyboardInterrupt
        return forward(self, *args)

    monkeypatch.setattr(type(problem.model), "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        distill(problem, *rounded, checkpoint=False)
    for path, module in quantizable(problem.model):
        assert mx.array_equal(module.weight, before[path]), path


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_only_what_helps_on_held_out_windows_is_kept(problem, rounded, monkeypatch, factor):
    precisions, start = rounded
    plan = Plan(precisions, {}, "taylor", 3.0, 3.0, kl=1.0)
    monkeypatch.setattr(conversion, "distill", lambda *args: {"tuned": None})
    monkeypatch.setattr(conversion, "judge", lambda *args: factor)
    said = []
    problem = replace(problem, say=said.append)
    done = conversion.distilled(conversion.Conversion(plan, start), problem)
    assert done.post_processing[-1]["kept"] == (factor < 1)
    assert (done.refined == {"tuned": None}) == (factor < 1)
    assert done.plan.kl == min(1.0, factor)
    assert bool(said) == (factor > 1)


def test_the_command_distills_and_bare_mlx_lm_loads_it(run, toy, text, tmp_path):
    out = tmp_path / "out"
    source = ("--hf-path", toy, "--optiq-calibration", text, "--optiq-budget", "4")
    run("mlx_lm.convert", *source, "--mlx-path", out, "--optiq-distill", check=True)
    steps = json.loads((out / "optiq_metadata.json").read_text())["post_processing"]
    assert [step["op"] for step in steps] == ["refine", "distill"]
    assert isinstance(steps[1]["kept"], bool)
    load = f"import mlx_lm; print(mlx_lm.load({str(out)!r})[0].layers[0].mlp.up_proj.bits)"
    assert int(run("python", "-c", load, env={"MLX_OPTIQ_EXT": "0"}, check=True).stdout) >= 2
    assert compute_bits_per_weight(mlx_lm.load(str(out))[0]) <= 4
