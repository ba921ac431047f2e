import json
from dataclasses import replace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import compute_bits_per_weight
from toy_fixtures import PLAIN, quiet, unmeasured
from toy_qwen3 import moe

from mlx_optiq_ext.errors import InputError, OptiqError
from mlx_optiq_ext.model.layers import quantizable
from mlx_optiq_ext.model.taps import Use
from mlx_optiq_ext.planning.calibration import Sampling
from mlx_optiq_ext.weights import Precision, Request, pipeline, put, read_plan, refine
from mlx_optiq_ext.weights.candidates import Size, tensors
from mlx_optiq_ext.weights.plan import Plan
from mlx_optiq_ext.weights.plan_search import Study
from mlx_optiq_ext.weights.precision import quantize
from mlx_optiq_ext.weights.rounding import refinement
from mlx_optiq_ext.weights.rounding.inputs import PRIOR, Fed, expert_metrics, expert_parts, inputs
from mlx_optiq_ext.weights.rounding.refinement import judge


@pytest.fixture
def problem(tiny):
    """The tiny model on a few hundred tokens, with 16 more sequences to refine on."""
    model, tokenizer = mlx_lm.load(str(tiny))[:2]
    text, sampling = tiny.parent / "calibration.jsonl", Sampling(length=64, count=8, refining=24)
    return unmeasured(model, tokenizer, calibration=text, sampling=sampling, effort="refine")


def test_refining_beats_plain_rounding_end_to_end(problem):
    precisions = {t.path: Precision(3, 64) for t in problem.tensors}
    before = {path: mx.array(module.weight) for path, module in quantizable(problem.model)}
    refined = refine(problem, precisions)
    plain = {path: quantize(problem.weights[path], precisions[path]) for path in precisions}
    assert set(refined) == set(precisions)
    for path, values in refined.items():
        assert [(a.shape, a.dtype) for a in values] == [(a.shape, a.dtype) for a in plain[path]]
    assert judge(problem, precisions, refined) < 0.7 * judge(problem, precisions, plain)
    for path, module in quantizable(problem.model):
        assert mx.array_equal(module.weight, before[path]), path


def test_refined_values_take_the_place_of_stocks(problem, tiny):
    precisions = {"model.layers.0.mlp.up_proj": Precision(4, 64)}
    refined = refine(problem, precisions)
    model = mlx_lm.load(str(tiny))[0]
    mlx_lm.utils.quantize_model(
        model, {}, 64, 4, quant_predicate=lambda path, *_: path in precisions
    )
    put(model, refined)
    layer = dict(model.named_modules())["model.layers.0.mlp.up_proj"]
    assert mx.array_equal(layer["weight"], refined["model.layers.0.mlp.up_proj"][0])
    assert mx.array_equal(layer["scales"], refined["model.layers.0.mlp.up_proj"][1])
    with pytest.raises(OptiqError, match="mlx-lm made"):
        put(model, {"model.layers.1.mlp.up_proj": refined["model.layers.0.mlp.up_proj"]})


def test_a_model_whose_layers_are_not_chained_is_rounded_plainly(problem, monkeypatch):
    monkeypatch.setattr(refinement, "chained", lambda recording: False)
    path = "model.layers.0.mlp.up_proj"
    refined = refine(problem, {path: Precision(4, 64)})
    plain = quantize(problem.weights[path], Precision(4, 64))
    assert all(mx.array_equal(a, b) for a, b in zip(refined[path], plain, strict=True))


def test_stacked_experts_are_refined_each_on_its_own_tokens(loaded, text):
    model = moe()
    sampling = Sampling(length=64, count=8, refining=24)
    problem = unmeasured(model, loaded[1], calibration=text, sampling=sampling)
    experts = [t.path for t in problem.tensors if "switch_mlp" in t.path]
    assert len(experts) == 6
    precisions = {path: Precision(2, 32) for path in experts}
    refined = refine(problem, precisions)
    plain = {path: quantize(problem.weights[path], precisions[path]) for path in precisions}
    for path, values in refined.items():
        assert [(a.shape, a.dtype) for a in values] == [(a.shape, a.dtype) for a in plain[path]]
    assert judge(problem, precisions, refined) < 0.8 * judge(problem, precisions, plain)


@pytest.mark.parametrize("length", [8, 64], ids=["as they come", "sorted by expert"])
def test_moments_of_experts_are_those_of_the_tokens_routed_to_them(length):
    model = moe()
    layer, path = model.layers[0].mlp, "model.layers.0.mlp.switch_mlp.up_proj"
    x = mx.random.normal((1, length, 64), key=mx.random.key(1))
    seen, _ = inputs({path: dict(quantizable(model))[path]}, lambda: layer(x))
    chosen = np.array(mx.argpartition(layer.gate(x), kth=-2, axis=-1)[0, :, -2:])
    rows = np.array(x[0])
    pooled = PRIOR * 64 * sum(rows[t : t + 1].T @ rows[t : t + 1] for t, _ in np.ndindex(length, 2))
    ((some, metric),) = expert_metrics([seen[path]], 4, [slice(0, 4)])
    assert some == slice(0, 4)
    for expert in range(4):
        own = rows[(chosen == expert).any(axis=-1)]
        expected = own.T @ own + pooled / (2 * length)
        assert np.allclose(metric.moment[expert], expected, atol=1e-3)
    # A bound on memory does not change what is found.
    few = list(expert_metrics([seen[path]], 4, [slice(0, 3), slice(3, 4)]))
    assert mx.array_equal(mx.concatenate([m.moment for _, m in few]), metric.moment)


def test_a_few_experts_at_a_time_are_within_a_bound_and_enough_to_share():
    parts = expert_parts(256, 7168)
    assert parts[0] == slice(0, 2)
    assert parts[-1].stop == 256
    assert {part.stop - part.start for part in parts} == {2}
    assert [part.stop - part.start for part in expert_parts(20, 64)] == [3, 3, 3, 3, 3, 3, 2]
    assert expert_parts(2, 1 << 20) == [slice(0, 1), slice(1, 2)]


def test_an_expert_that_saw_no_token_is_rounded_against_the_others():
    use = Use("experts", mx.ones((3, 1, 2)), mx.array([1, 1, 1]), mx.zeros((3, 1, 5)))
    fed = Fed(use.inputs, use.indices, use.outputs.shape[:-1])
    ((_, metric),) = expert_metrics([fed], 2, [slice(0, 2)])
    assert np.allclose(metric.moment[0], 2 * PRIOR * np.ones((2, 2)))
    assert np.allclose(metric.moment[1], (3 + 2 * PRIOR) * np.ones((2, 2)))


PLAN = {"model.layers.0.mlp.up_proj": {"bits": 3, "group_size": 64}}


def write(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def candidates(model):
    found = tuple(tensors(model, allow_unquantized=True))
    return found, Size.of(model, found)


@pytest.mark.parametrize(
    "content", [{"per_layer": PLAN}, {"optimization": {"per_layer": PLAN}}], ids=["ours", "older"]
)
def test_a_plan_is_read_in_both_forms(loaded, tmp_path, content):
    plan = read_plan(write(tmp_path, content), *candidates(loaded[0]))
    assert plan.precisions["model.layers.0.mlp.up_proj"] == Precision(3, 64)
    assert set(plan.precisions.values()) == {Precision(3, 64)}


def test_a_wrappers_prefix_is_no_obstacle(loaded, tmp_path):
    content = {"per_layer": {f"language_model.{path}": e for path, e in PLAN.items()}}
    plan = read_plan(write(tmp_path, content), *candidates(loaded[0]))
    assert plan.precisions["model.layers.0.mlp.up_proj"] == Precision(3, 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ([], "has no per_layer"),
        ({"per_layer": {}}, "has no per_layer"),
        ({"per_layer": {"a": 3}}, "bits of a is None"),
        ({"per_layer": {"a": {"bits": "3"}}}, "bits of a is '3'"),
        ({"per_layer": {"a": {"bits": True}}}, "bits of a is True"),
        ({"per_layer": {"a": {"bits": 7, "group_size": 64}}}, "a has 7 bits in groups of 64"),
        ({"per_layer": {"a": {"bits": 4, "group_size": 48}}}, "groups of 48"),
        ({"per_layer": {"a": {"bits": 4, "mode": "int4"}}}, "mode of a is 'int4', which MLX lacks"),
        ({"per_layer": {"a": {"bits": 4, "mode": "nvfp4"}}}, "give 4 bits and groups of 16"),
        ({"per_layer": {"a.b": {"bits": 4}}}, "names a.b, which this model does not have"),
        (
            {"per_layer": {"model.layers.0.mlp.up_proj": {"bits": 4, "group_size": 128}}},
            "64 inputs, which groups of 128 do not divide",
        ),
    ],
)
def test_a_bad_plan_is_refused_naming_the_field(loaded, tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(InputError, match=message) as error:
        read_plan(path, *candidates(loaded[0]))
    assert "plan.json" in str(error.value)


def test_a_plan_may_mix_modes(run, toy, tmp_path):
    mixed = {
        "model.layers.0.mlp.up_proj": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
        "model.layers.1.mlp.up_proj": {"bits": 3, "group_size": 64},
        "model.layers.1.mlp.gate_proj": {"bits": 4, "group_size": 16, "mode": "nvfp4"},
        "model.layers.0.mlp.gate_proj": {"bits": 8, "group_size": 64},
    }
    file, out = write(tmp_path, {"per_layer": mixed}), tmp_path / "out"
    done = run(
        *("mlx_lm.convert", "--hf-path", toy, "--mlx-path", out, "--optiq-plan", file), check=True
    )
    assert "1 x mxfp4" in done.stdout
    metadata = json.loads((out / "optiq_metadata.json").read_text())
    kept = {path: {**metadata["per_layer"][path]} for path in mixed}
    assert {path: entry.pop("kl") for path, entry in kept.items()} == dict.fromkeys(mixed, 0.0)
    assert kept == mixed
    modules = dict(mlx_lm.load(str(out))[0].named_modules())
    for path, entry in mixed.items():
        assert modules[path].mode == entry.get("mode", "affine")
        assert (modules[path].bits, modules[path].group_size) == (
            entry["bits"],
            entry["group_size"],
        )


def test_an_edited_plan_converts_without_measuring(run, toy, text, tmp_path):
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    source = ("--hf-path", toy, "--optiq-calibration", text)
    run("mlx_lm.convert", *source, "--mlx-path", first, *PLAIN, "--optiq-budget", "4", check=True)
    plan = first / "optiq_metadata.json"
    content = json.loads(plan.read_text())
    content["per_layer"]["model.layers.1.mlp.down_proj"].update(bits=8, group_size=32)
    plan.write_text(json.dumps(content))
    command = ("mlx_lm.convert", "--hf-path", toy, "--optiq-plan", plan)
    done = run(*command, "--mlx-path", second, check=True)
    assert "Measuring" not in done.stdout
    config = json.loads((second / "config.json").read_text())["quantization"]
    edited = config["model.layers.1.mlp.down_proj"]
    assert (edited["bits"], edited["group_size"]) == (8, 32)
    again = ("--optiq-effort", "refine", "--optiq-calibration", text)
    run(*command, "--mlx-path", third, *again, check=True)
    metadata = json.loads((third / "optiq_metadata.json").read_text())
    assert metadata["post_processing"][0]["op"] == "refine"
    bits = [compute_bits_per_weight(mlx_lm.load(str(f))[0]) for f in (second, third)]
    assert bits[0] == bits[1]
    clash = run(*command, "--mlx-path", tmp_path / "x", *PLAIN, "--optiq-budget", "4")
    assert clash.returncode == 2
    assert "--optiq-plan decides already what --optiq-budget would" in clash.stderr


@pytest.mark.parametrize("kl", [0.5, 2.0])
def test_a_refinement_that_does_not_help_is_left_out(problem, monkeypatch, kl):
    precisions, said = {"model.layers.0.mlp.up_proj": Precision(4, 64)}, []
    plan = Plan(precisions, {}, "taylor", 4.0, 4.0, kl=1.0)
    monkeypatch.setattr(pipeline, "judge", lambda *args: kl)
    study = Study(problem, {}, "taylor")
    done = pipeline.refined(
        pipeline.Conversion(plan, study=study), replace(problem, say=said.append)
    )
    assert done.post_processing[-1]["kept"] == (kl < 1)
    assert bool(done.refined) == (kl < 1)
    assert done.plan.kl == min(kl, 1.0)
    assert any("Refinement did not lower" in line for line in said) == (kl > 1)


def test_an_effort_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="no effort 'most': give plan, refine, distill"):
        Request(effort="most")


def test_a_conversion_that_refinement_does_not_help_is_planned_without(toy, text, monkeypatch):
    monkeypatch.setattr(pipeline, "judge", lambda *args: 9.0)
    request = quiet(budget=4.5, calibration=text, effort="refine")
    done = pipeline.prepare(str(toy), request)
    assert not done.refined
    assert done.plan.kl is not None
    assert done.plan.below is not None
    assert done.plan.kl <= done.plan.below.kl
    assert done.plan.achieved_bpw <= 4.5
    assert any("Refinement did not lower" in line for line in done.plan.notes)
