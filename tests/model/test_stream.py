"""Models larger than memory: the same result, with one layer resident."""

import json
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models import qwen3
from toy_fixtures import quiet
from toy_qwen3 import moe, toy_config, write_toy

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.model import layerwise as lockstep
from mlx_optiq_ext.model import memory
from mlx_optiq_ext.model.layers import quantizable
from mlx_optiq_ext.model.replay import record
from mlx_optiq_ext.model.stream import Stream, parameters, runs_whole
from mlx_optiq_ext.planning.calibration import Sampling
from mlx_optiq_ext.weights import (
    Precision,
    Request,
    calibrated,
    plan_folder,
    prepare,
    refine,
)
from mlx_optiq_ext.weights import (
    study as planning,
)
from mlx_optiq_ext.weights.rounding.refinement import judge
from mlx_optiq_ext.weights.sensitivity.problem import end_to_end
from mlx_optiq_ext.weights.shards import by_source

TOKENS = mx.array([[5, 9, 200, 31, 7, 44, 81, 3], [8, 8, 100, 2, 64, 12, 900, 77]])


def dense() -> qwen3.Model:
    """A random two-layer model, the same each time."""
    mx.random.seed(0)
    return qwen3.Model(qwen3.ModelArgs.from_dict(toy_config()))


#: A few short calibration sequences, none of them sampled: of a streamed model none ever is.
SHORT = Sampling(length=32, count=8, refining=12, beside=0)


def unmeasured(folder, text, monkeypatch, *, streaming: bool, **settings):
    monkeypatch.setenv(memory.SWITCH, str(int(streaming)))
    model, tokenizer, _ = planning.load_unquantized(str(folder))
    request = quiet(calibration=text, sampling=SHORT, **settings)
    return calibrated(model, tokenizer, request, load=lambda: planning.reload(str(folder)))


@pytest.mark.parametrize("method", ["taylor", "kl"])
def test_costs_and_plan_are_the_same_bit_for_bit(toy, text, tmp_path, monkeypatch, method):
    plans = {}
    for switch in "01":
        monkeypatch.setenv(memory.SWITCH, switch)
        monkeypatch.setenv("MLX_OPTIQ_EXT_CACHE", str(tmp_path / switch))
        request = quiet(budget=4.0, calibration=text, sampling=SHORT, method=method)
        plan = plan_folder(str(toy), request)
        plans[switch] = (
            plan.precisions,
            plan.sensitivities,
            plan.kl,
            plan.below,
            plan.variant,
        )
    assert plans["0"] == plans["1"]


def test_refined_values_are_the_same_bit_for_bit(toy, text, monkeypatch):
    results = []
    for streaming in (False, True):
        problem = unmeasured(toy, text, monkeypatch, streaming=streaming, effort="refine")
        assert (problem.stream is not None) == streaming
        precisions = {t.path: Precision(3, 32) for t in problem.tensors[::3]}
        refined = refine(problem, precisions)
        results.append((refined, judge(problem, precisions, refined)))
    (one, kl), (other, streamed_kl) = results
    assert set(one) == set(other)
    assert kl == streamed_kl
    for path, packed in other.items():
        assert all(mx.array_equal(a, b) for a, b in zip(one[path], packed, strict=True)), path


def test_the_command_writes_the_same_weights_in_small_shards(run, toy, text, tmp_path):
    written = {}
    for switch in "01":
        out = tmp_path / f"out{switch}"
        source = ("--hf-path", toy, "--mlx-path", out, "--optiq-calibration", text)
        environment = {memory.SWITCH: switch, "MLX_OPTIQ_EXT_CACHE": str(tmp_path / switch)}
        options = ("--optiq-budget", "4.0", "--optiq-effort", "plan")
        done = run("mlx_lm.convert", *source, *options, env=environment, check=True)
        assert ("layer by layer" in done.stdout) == (switch == "1")
        shards = sorted(out.glob("model*.safetensors"))
        written[switch] = shards, {}
        for shard in shards:
            written[switch][1].update(mx.load(str(shard)))
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(written[switch][1])
        assert set(index["weight_map"].values()) == {path.name for path in shards}
    (whole, plain), (shards, streamed) = written["0"], written["1"]
    assert len(whole) == 1
    assert len(shards) > 2
    assert set(plain) == set(streamed)
    assert all(mx.array_equal(plain[name], streamed[name]) for name in plain)
    metadata = [(tmp_path / f"out{s}" / "optiq_metadata.json").read_text() for s in "01"]
    assert metadata[0] == metadata[1]
    left = [path.name for path in tmp_path.iterdir() if "spill" in path.name]
    assert left == []
    mlx_lm.load(str(tmp_path / "out1"))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model of 200 MB in bfloat16, in 40 layers of 5 MB."""
    return write_toy(
        tmp_path_factory.mktemp("models") / "deep",
        layers=40,
        hidden_size=512,
        intermediate_size=1280,
        head_dim=64,
        num_attention_heads=8,
        num_key_value_heads=4,
    )


@pytest.mark.newest
def test_memory_holds_one_layer_not_the_model(deep, text, monkeypatch):
    stored = sum(path.stat().st_size for path in deep.glob("model*.safetensors"))
    assert stored > 200e6
    monkeypatch.setenv(memory.SWITCH, "1")
    sampling = replace(SHORT, count=2, held_out_every=2)
    settings = {"bits": (4,), "group_sizes": (64,), "calibration": text, "sampling": sampling}
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    prepare(str(deep), quiet(budget=4.6, **settings))
    # A layer takes 10 MB in float32, its moments and what is computed with them some more.
    assert mx.get_peak_memory() - before < stored / 4
    mx.reset_peak_memory()
    end_to_end(unmeasured(deep, text, monkeypatch, streaming=False), [{}])
    assert mx.get_peak_memory() > stored


def test_between_calls_no_layer_is_resident(toy, tmp_path):
    model: Any = planning.reload(str(toy))
    plain: Any = planning.reload(str(toy))
    expected = plain(TOKENS)
    mx.eval(expected)
    stream = Stream(model, lambda: planning.reload(str(toy)), lambda a: a, tmp_path)
    weight = parameters(plain)["model.layers.1.mlp.up_proj.weight"]
    for _ in range(3):
        assert mx.array_equal(model(TOKENS), expected)
        assert model.layers[1].mlp.up_proj.weight.size == 0
    with stream.layer(1), stream.layer(1):
        assert mx.array_equal(model.layers[1].mlp.up_proj.weight, weight)
        assert model.layers[0].mlp.up_proj.weight.size == 0
    assert mx.array_equal(stream["model.layers.1.mlp.up_proj"], weight)
    assert mx.array_equal(stream["model.embed_tokens"], plain.model.embed_tokens.weight)
    before = mx.get_active_memory()
    mx.eval(model(TOKENS))
    assert mx.get_active_memory() - before < weight.nbytes


@pytest.mark.parametrize("build", [moe, dense], ids=["experts", "dense"])
def test_layer_by_layer_records_what_batch_by_batch_does(build, tmp_path):
    plain, model, batches = build(), build(), [TOKENS, TOKENS[:, ::-1]]
    kept = [record(plain, tokens)[1] for tokens in batches]
    stream = Stream(model, build, lambda array: array, tmp_path)
    for one, other in zip(kept, lockstep.recordings(model, batches, stream), strict=True):
        assert len(one) == len(other)
        for call, spilled in zip(one, other, strict=True):
            assert (call.index, call.follows) == (spilled.index, spilled.follows)
            assert mx.array_equal(call.hidden, spilled.hidden)
            assert mx.array_equal(call.hidden_out, spilled.hidden_out)
            assert len(call.args) == len(spilled.args)
            assert set(call.kwargs) == set(spilled.kwargs)


def test_the_state_that_enters_the_layers_needs_none_of_them(loaded):
    model = loaded[0]
    assert mx.array_equal(lockstep.entry(model, TOKENS), record(model, TOKENS)[1][0].hidden)


@pytest.fixture
def notes(monkeypatch):
    """Lets the layers of Qwen3 hand on a dict, which a later layer could write to."""
    block = qwen3.TransformerBlock.__call__

    def with_notes(self, *args):
        return block(self, *args), {}

    def run(self, inputs, cache=None, input_embeddings=None):
        h = self.embed_tokens(inputs)
        for layer in self.layers:
            h, _ = layer(h, "causal", None)
        return self.norm(h)

    monkeypatch.setattr(qwen3.TransformerBlock, "__call__", with_notes)
    monkeypatch.setattr(qwen3.Qwen3Model, "__call__", run)


def test_a_model_that_cannot_be_replayed_is_measured_directly(toy, text, notes, monkeypatch):
    said = []
    monkeypatch.setenv(memory.SWITCH, "1")
    request = Request(
        effort="plan",
        budget=4.2,
        bits=(3,),
        group_sizes=(32,),
        calibration=text,
        sampling=SHORT,
        say=said.append,
    )
    plan = plan_folder(str(toy), request)
    assert any("do not run one by one" in line for line in said)
    assert plan.kl is not None


def test_a_model_whose_layers_run_in_parts_stays_in_memory(toy, text, monkeypatch):
    model = planning.reload(str(toy))
    assert runs_whole(model)

    def in_parts(self, tokens, *_):
        h = self.model.embed_tokens(tokens)
        for each in self.model.layers:
            h = h + each.mlp(each.input_layernorm(h))
        return self.model.embed_tokens.as_linear(self.model.norm(h))

    monkeypatch.setattr(type(model), "__call__", in_parts)
    assert not runs_whole(model)
    said = []
    monkeypatch.setenv(memory.SWITCH, "1")
    loaded, tokenizer, _ = planning.load_unquantized(str(toy))
    request = Request(effort="plan", calibration=text, sampling=SHORT, say=said.append)
    problem = calibrated(loaded, tokenizer, request, load=lambda: pytest.fail("read twice"))
    assert problem.stream is None
    assert "its layers run in parts" in said[0]


def test_parameters_that_are_not_there_cannot_be_computed_with(tmp_path):
    model = dense()
    Stream(model, dense, lambda array: array, tmp_path)
    with pytest.raises(ValueError, match=r".+"):
        model.layers[0].mlp(mx.ones((1, 2, 64)))


def test_a_shards_originals_stay_within_the_limit():
    weights = {f"{n}.weight": mx.zeros((8, 16), mx.uint32) for n in range(4)}
    precisions = dict.fromkeys("0123", Precision(4, 64))
    # 512 bytes each, from 2048 bytes in half precision.
    assert [list(s) for s in by_source(weights, precisions, 4096)] == [
        ["0.weight", "1.weight"],
        ["2.weight", "3.weight"],
    ]
    assert len(by_source(weights, precisions, 100)) == 4


def test_a_model_is_read_layer_by_layer_when_it_takes_too_much(toy, monkeypatch):
    model = planning.reload(str(toy))
    needed = memory.resident_bytes(model)
    assert needed >= sum(array.nbytes for array in parameters(model).values())
    limit = int(needed / memory.SHARE)
    assert not memory.streams(model, limit + 10)
    assert memory.streams(model, limit - 10)
    monkeypatch.setenv(memory.SWITCH, "0")
    assert not memory.streams(model, limit - 10)
    monkeypatch.setenv(memory.SWITCH, "yes")
    with pytest.raises(InputError, match="neither 0"):
        memory.streams(model)


def test_a_limit_of_the_shell_counts(run):
    source = (
        "import resource; from mlx_optiq_ext.model import memory;"
        "resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30)); print(memory.memory_limit())"
    )
    assert int(run("python", "-c", source, check=True).stdout) == 3 << 30


def test_distillation_of_a_model_larger_than_memory_is_refused(toy, text, monkeypatch):
    monkeypatch.setenv(memory.SWITCH, "1")
    request = quiet(budget=4.0, calibration=text, effort="distill")
    with pytest.raises(InputError, match="give --optiq-effort refine"):
        prepare(str(toy), request)


def test_no_tensor_of_a_stream_is_missing(toy, tmp_path):
    model = planning.reload(str(toy))
    paths = {path for path, _ in quantizable(model)}
    stream = Stream(model, lambda: planning.reload(str(toy)), lambda a: a, tmp_path)
    assert paths <= set(stream)
    assert len(stream) == len(set(stream))
