"""Precisions that the user fixes, with the rest planned in what is left of the budget."""

import json
import shutil

import mlx_lm
import numpy as np
import pytest
from toy_fixtures import PLAIN, quiet
from toy_qwen3 import moe

from mlx_optiq_ext.errors import BudgetError, InputError
from mlx_optiq_ext.weights import (
    Budget,
    Pin,
    Precision,
    Request,
    plan_folder,
    search,
    study_model,
    tensors,
)
from mlx_optiq_ext.weights.pins import pinned

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


def planned(toy, text, budget, *pins, **settings):
    request = quiet(calibration=text, pins=tuple(map(Pin.parse, pins)), **settings)
    return plan_folder(str(toy), Request(**{**vars(request), "budget": budget}))


@pytest.mark.parametrize(
    ("text", "pin"),
    [
        ("*.v_proj=8", Pin("*.v_proj", 8)),
        ("model.layers.[01].*=3g128", Pin("model.layers.[01].*", 3, 128)),
        (" lm_head = 16 ", Pin("lm_head", 16)),
    ],
)
def test_a_pin_is_read(text, pin):
    assert Pin.parse(text) == pin
    assert Pin.parse(str(pin)) == pin


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("*.v_proj", "is not PATTERN=BITS"),
        ("=4", "is not PATTERN=BITS"),
        ("a b=4", "is not PATTERN=BITS"),
        ("a=four", "is not PATTERN=BITS"),
        ("a=4g", "is not PATTERN=BITS"),
        ("a=7", "is no precision of MLX: give 2, 3, 4, 5, 6, 8 bits"),
        ("a=4g48", "in groups of 32, 64, 128"),
        ("a=16g64", "has groups for what stays in 16 bits"),
    ],
)
def test_what_is_no_pin_is_refused(text, said):
    with pytest.raises(InputError, match=r"^[^\n]+$") as raised:
        Pin.parse(text)
    assert said in str(raised.value)


def test_pinned_tensors_have_their_precision_and_the_rest_fills_the_budget(toy, text):
    found = planned(toy, text, 5.0, "*.mlp.*=8g32", f"{DOWN}=3")
    for path, precision in found.precisions.items():
        if path == DOWN:
            assert precision.bits == 3
        elif ".mlp." in path:
            assert precision == Precision(8, 32)
    assert 4.95 < found.achieved_bpw <= 5.0
    assert {p.bits for path, p in found.precisions.items() if ".mlp." not in path} != {8}


@pytest.mark.parametrize("method", ["taylor", "kl"])
def test_what_is_left_alone_stands_in_the_plan_and_its_bits_count(toy, text, method):
    found = planned(toy, text, 6.0, f"{UP}=16", method=method)
    assert found.precisions[UP] == Precision(16, 0)
    assert found.sensitivities[UP] == 0
    assert 5.9 < found.achieved_bpw <= 6.0
    assert len(found.precisions) == len(planned(toy, text, 6.0).precisions)


def test_pins_hold_below_the_bits_and_protection_that_are_asked_for(toy, text):
    found = planned(toy, text, 8.9, "*.0.mlp.up_proj=2", bits=(4, 8), protect=True)
    assert found.precisions[UP].bits == 2
    assert found.precisions["model.embed_tokens"].bits >= 8


def test_pins_go_with_a_size(toy, text):
    found = planned(toy, text, Budget.parse("100KB"), "model.embed_tokens=4g64")
    assert found.precisions["model.embed_tokens"] == Precision(4, 64)
    assert found.budget == "100KB"


def test_uniform_quantizations_and_earlier_plans_give_way_to_pins(toy, text):
    model, tokenizer = mlx_lm.load(str(toy))[:2]
    request = quiet(calibration=text, pins=(Pin.parse(f"{UP}=8g32"),))
    study = study_model(model, tokenizer, request)

    def measure(_, plans):  # the uniform ones come last, and are the best
        return [np.full((1, 64), 1.0 / (n + 1)) for n in range(len(plans))]

    for budget in (4.5, 5.0):
        found = search(study, budget, measure=measure)
        assert found.precisions[UP] == Precision(8, 32)
        assert not found.variant.startswith("uniform")


@pytest.mark.parametrize(
    ("pins", "budget", "error", "said"),
    [
        (("*.nothing=4",), 5.0, InputError, r"pin \*.nothing=4 matches no tensor of this model"),
        (("*=8",), 5.0, BudgetError, r"too small for this model: with the pins it takes from 8"),
        (("model.embed_tokens=16",), 3.0, BudgetError, "with the pins it takes from"),
        (("*.q_proj=4g128",), 5.0, InputError, "with 64 inputs, which groups of 128 do not"),
        (("*=16",), 5.0, InputError, "leave all tensors of this model alone"),
    ],
)
def test_pins_that_cannot_be_are_one_sentence(toy, text, pins, budget, error, said):
    with pytest.raises(error, match=said) as raised:
        planned(toy, text, budget, *pins)
    assert "\n" not in str(raised.value)


def test_what_the_models_own_code_leaves_alone_is_no_pin(monkeypatch):
    model = moe()
    monkeypatch.setattr(
        type(model), "quant_predicate", property(lambda self: lambda path, _: "gate" not in path)
    )
    found = tensors(model)
    paths = [t.path for t in found] + ["model.layers.0.mlp.gate"]
    with pytest.raises(InputError, match="the model's own code leaves it alone"):
        pinned(found, paths, [Pin("*.mlp.gate", 8)], (64,))
    assert pinned(found, paths, [Pin("*.mlp.gate", 16)], (64,)) == (found, {})


def test_a_pin_may_go_below_the_models_own_floor():
    found = tensors(moe())
    gate = next(t for t in found if t.own is not None)
    planned, _ = pinned(found, [t.path for t in found], [Pin(gate.path, 3)], (32, 64))
    (changed,) = (t for t in planned if t.pinned)
    assert {p.bits for p in changed.precisions} == {3}


def test_only_pinned_precisions_are_measured(toy, text):
    model, tokenizer = mlx_lm.load(str(toy))[:2]
    request = quiet(calibration=text, pins=(Pin.parse("*.mlp.*=4g64"), Pin.parse(f"{UP}=16")))
    study = study_model(model, tokenizer, request)
    assert UP not in study.sensitivity
    assert set(study.sensitivity[DOWN]) == {Precision(4, 64)}


@pytest.fixture
def converted(command, toy, text, tmp_path):
    """Converts with some words into a folder."""

    def converted(name, *words):
        source = ("--hf-path", toy, "--optiq-calibration", text, *PLAIN)
        done = command("convert", *source, "--mlx-path", tmp_path / name, *words)
        return done, tmp_path / name

    return converted


def config(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization"]


def test_the_command_pins_and_a_folder_is_a_plan(converted):
    pins = ("--optiq-pin", "*.v_proj=8g32", "--optiq-pin", f"{UP}=16")
    done, out = converted("out", "--optiq-budget", 6, *pins)
    assert done.status == 0, done.err
    written = config(out)
    assert written["model.layers.1.self_attn.v_proj"] == {"bits": 8, "group_size": 32}
    assert UP not in written
    done, again = converted("again", "--optiq-plan", out)
    assert done.status == 0, done.err
    assert config(again) == written
    weights = [(each / "model.safetensors").read_bytes() for each in (out, again)]
    assert weights[0] == weights[1]
    (out / "optiq_metadata.json").unlink()
    done, _ = converted("third", "--optiq-plan", out)
    assert done.status == 2
    assert "has no optiq_metadata.json: name a folder" in done.err.splitlines()[-1]
    shutil.rmtree(out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--optiq-budget", "5", "--optiq-pin", "x"), "argument --optiq-pin: 'x' is not PATTERN="),
        (
            ("--optiq-pin", "*=8"),
            "--optiq-pin, --optiq-calibration, --optiq-effort needs --optiq-b",
        ),
        (("--optiq-budget", "5", "--optiq-pin", "*.none=8"), "the pin *.none=8 matches no tensor"),
        (("--optiq-budget", "3", "--optiq-pin", "*=4"), "too small for this model: with the pins"),
        (
            ("--optiq-plan", "plan.json", "--optiq-pin", "*=8"),
            "--optiq-plan decides already what --optiq-pin would: leave one of them out",
        ),
    ],
)
def test_the_command_refuses_pins_before_it_measures(converted, words, said):
    done, out = converted("out", *words)
    assert done.status == 2
    assert said in done.err.splitlines()[-1]
    assert "Measuring" not in done.out + done.err
    assert not out.exists()
