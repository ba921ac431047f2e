"""Every architecture of the installed mlx-lm, at toy size, is measured, planned and quantized."""

import importlib
import json
import pkgutil
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import compute_bits_per_weight, load_model, quantize_model, save_model
from toy_fixtures import quiet, without_gradients
from toy_models import FAMILIES, NO_METAL, TOYS, UNSAFE, UNSUPPORTED, build, config

from mlx_optiq_ext.model.layers import calls_replaced, decoder_layers, quantizable
from mlx_optiq_ext.model.layerwise import outlines
from mlx_optiq_ext.model.replay import record, replayed
from mlx_optiq_ext.model.stream import Stream, runs_whole
from mlx_optiq_ext.planning.calibration import Sampling
from mlx_optiq_ext.planning.parts import Parts
from mlx_optiq_ext.weights import Plan, Precision, Request, plan_model, tensors
from mlx_optiq_ext.weights.candidates import Size
from mlx_optiq_ext.weights.sensitivity import fisher

BITS, GROUP_SIZES = (2, 4, 8), (32, 64)
TOKENS = mx.array([[5, 9, 20, 31, 7, 44, 81, 3], [8, 8, 60, 2, 64, 12, 90, 77]])


#: The layers write to a cache or an object that they share, or are not called as a whole.
NOT_REPLAYED = {"afm7", "deepseek_v41", "iquestloopcoder", "kimi_k3"}

#: The layers are not called, only parts of them.
IN_PARTS = {"iquestloopcoder"}

#: Where MLX has no gradient for how experts or keys are picked, in some releases of mlx-lm.
NOT_DIFFERENTIATED = {"deepseek_v32", "deepseek_v41", "glm_moe_dsa"}

CONVERTED = [name for name in FAMILIES if name not in UNSUPPORTED and name not in UNSAFE]


class Letters:
    """A tokenizer of one token a character."""

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) % 90 for letter in text]


def arrays(model: nn.Module) -> dict[str, mx.array]:
    """Every parameter by its path."""
    leaves = tree_flatten(model.parameters())
    assert isinstance(leaves, list)
    return dict(leaves)


def factors_of(model: nn.Module) -> dict[str, fisher.Factors] | None:
    """Factors from one window, or None if MLX has no gradient for an operation."""
    try:
        blocks = fisher.factors(model, [TOKENS[:1]])
        return {path: found for block in blocks for path, found in block.items()}
    except fisher.GradientError:
        return None


@pytest.fixture(autouse=True, scope="module")
def uncompiled() -> Iterator[None]:
    """Compiling hundreds of small kernels takes longer than running them."""
    mx.disable_compile()
    yield
    mx.enable_compile()


#: Two short calibration sequences, one of them held out.
SHORT = Sampling(length=8, count=2, held_out_every=2)


def test_every_architecture_has_a_toy_config_or_a_reason():
    modules = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)}
    # The layers of bitnet cannot be imported without Metal either, in older releases.
    for name in modules - set(UNSUPPORTED) - {"bitlinear_layers"}:
        module = importlib.import_module(f"mlx_lm.models.{name}")
        assert (name in FAMILIES) == (hasattr(module, "Model") and hasattr(module, "ModelArgs"))
    without = set(FAMILIES) - set(TOYS["families"])
    assert not without, "give them a config in tests/data/toy_configs.json"
    assert set(UNSUPPORTED) | NOT_REPLAYED | NOT_DIFFERENTIATED <= set(TOYS["families"])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in UNSUPPORTED])
def test_an_unsupported_architecture_fails_as_it_says(name):
    error, _ = UNSUPPORTED[name]
    if error == NO_METAL and mx.metal.is_available():
        pytest.skip("not tried with Metal")

    def convert() -> None:
        mx.eval(build(name)(TOKENS))
        quantize_model(build(name), {}, group_size=64, bits=4)

    with pytest.raises((Exception, SystemExit), match=error):
        convert()


@pytest.mark.parametrize("name", CONVERTED)
def test_an_architecture_is_planned_and_packed_within_its_budget(name, text):
    model = build(name)
    before, candidates = arrays(model), tensors(model, BITS, GROUP_SIZES)
    size = Size.of(model, candidates)
    ends = [
        size.bits_per_weight(sum(t.stored_bits(t.precisions[end]) for t in candidates))
        for end in (0, -1)
    ]
    budget = 0.6 * ends[0] + 0.4 * ends[1]
    plan = plan_model(
        model,
        Letters(),
        quiet(
            budget=budget,
            bits=BITS,
            group_sizes=GROUP_SIZES,
            calibration=text,
            sampling=SHORT,
        ),
    )
    assert ends[0] < plan.achieved_bpw <= budget
    assert max(plan.sensitivities.values()) > 0
    after = arrays(model)
    assert set(after) == set(before)
    assert all(mx.array_equal(after[path], value) for path, value in before.items())

    own = getattr(model, "quant_predicate", None) or (lambda path, module: True)
    quantized = build(name)
    for path, module in quantizable(quantized):
        floor, precision = own(path, module), plan.precisions.get(path)
        assert (precision is None) or floor is not False
        if precision is not None and isinstance(floor, dict):
            assert precision.bits >= floor["bits"]
            assert precision.group_size <= floor.get("group_size", 64)
    quantized, _ = quantize_model(
        quantized,
        {},
        group_size=plan.default.group_size,
        bits=plan.default.bits,
        quant_predicate=plan.predicate(),
    )
    assert compute_bits_per_weight(quantized) == pytest.approx(plan.achieved_bpw, abs=1e-9)
    logits, plain = quantized(TOKENS), model(TOKENS)
    assert logits.shape == plain.shape
    assert not mx.any(mx.isnan(logits))
    assert not mx.array_equal(logits, plain)


def test_layers_that_know_no_mode_are_packed_and_loaded_again(tmp_path):
    precisions = {path: Precision(4, 32) for path, _ in quantizable(build("afm7"))}
    predicate = Plan(precisions, {}, "taylor", 5.0, 5.0).predicate()
    quantized, written = quantize_model(
        build("afm7"), config("afm7"), group_size=32, bits=4, quant_predicate=predicate
    )
    save_model(tmp_path, quantized)
    (tmp_path / "config.json").write_text(json.dumps(written))
    loaded = load_model(tmp_path)[0]
    assert mx.array_equal(loaded(TOKENS), quantized(TOKENS))
    assert not mx.array_equal(quantized(TOKENS), build("afm7")(TOKENS))


@pytest.mark.parametrize("name", CONVERTED)
def test_an_architecture_is_replayed_and_differentiated_by_layer(name, monkeypatch):
    model = build(name)
    plain = model(TOKENS)
    logits, recording = record(model, TOKENS)
    assert mx.array_equal(logits, plain)
    for start in range(len(decoder_layers(model)) + 1):
        with calls_replaced(decoder_layers(model), replayed(recording, start)):
            assert mx.array_equal(model(TOKENS), plain), start
    chunked = Parts.of(model, *TOKENS.shape, limit=8 * plain.shape[-1])  # two tokens at a time
    logits = mx.concatenate(list(chunked.logits(TOKENS))).reshape(plain.shape)
    assert mx.allclose(logits, plain, rtol=1e-3, atol=1e-4), chunked.recording
    assert bool(recording) == (name not in NOT_REPLAYED)
    if not recording:
        return
    outlined = outlines(model, [TOKENS])
    if outlined is not None:
        for call, known in zip(outlined[0], recording, strict=True):
            one = call.entered(known.hidden)
            output = decoder_layers(model)[call.index](*one.args, **one.kwargs)
            assert mx.array_equal(output, known.hidden_out), call.index
    by_layer = factors_of(model)
    monkeypatch.setattr(fisher, "recordings", lambda *_: [[]])
    whole = factors_of(model)
    assert (by_layer is None) == (whole is None)
    if by_layer is None or whole is None:
        assert name in NOT_DIFFERENTIATED
        return
    for path, factors in whole.items():
        for field in ("inputs", "outputs", "lookups", "columns"):
            one, other = getattr(by_layer[path], field), getattr(factors, field)
            assert (one is None) == (other is None), (path, field)
            if one is not None:
                scale = float(mx.abs(other).max())
                assert float(mx.abs(one - other).max()) <= 1e-3 * scale + 1e-9, (path, field)


@pytest.mark.parametrize("name", CONVERTED)
def test_an_architecture_gives_the_same_factors_from_disk(name, tmp_path):
    model, read = build(name), build(name)
    assert runs_whole(read) == (name not in IN_PARTS)
    if name in IN_PARTS:
        return
    stream = Stream(read, lambda: build(name), lambda array: array, tmp_path)
    assert mx.array_equal(model(TOKENS), read(TOKENS))
    if name in NOT_REPLAYED | NOT_DIFFERENTIATED:
        return
    blocks = (fisher.factors(m, [TOKENS[:1]], stream=s) for m, s in ((model, None), (read, stream)))
    for whole, streamed in zip(*blocks, strict=True):
        assert set(whole) == set(streamed)
        for path, factors in whole.items():
            for field, value in vars(factors).items():
                other = getattr(streamed[path], field)
                arrays = isinstance(value, mx.array)
                assert mx.array_equal(value, other) if arrays else value == other, (path, field)


def test_a_model_without_gradients_is_measured_directly_and_says_so(text, monkeypatch):
    without_gradients(monkeypatch)
    lines: list[str] = []
    request = Request(
        effort="plan",
        budget=9.0,
        calibration=text,
        sampling=SHORT,
        say=lines.append,
        progress=False,
    )
    direct = plan_model(build("qwen3"), Letters(), request)
    (line,) = [line for line in lines if "cannot be differentiated" in line]
    assert "VJP not implemented for scatter_prod): measuring each tensor directly" in line
    measured = plan_model(build("qwen3"), Letters(), replace(request, method="kl"))
    assert direct.sensitivities == measured.sensitivities
    assert direct.notes == (line.removeprefix("[optiq] "),)
    assert measured.notes == ()
