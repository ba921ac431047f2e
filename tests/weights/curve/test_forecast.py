"""What conversions would come to, before they are made."""

import json
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from toy_fixtures import PLAIN, quiet, unmeasured
from toy_qwen3 import write_toy

from mlx_optiq_ext.errors import BudgetError, InputError
from mlx_optiq_ext.weights import Budget, Pin, Precision, plan_folder
from mlx_optiq_ext.weights.curve import Curve, compare, drawn, forecast, summary
from mlx_optiq_ext.weights.sensitivity.problem import end_to_end


@pytest.fixture
def curve(toy, text) -> Curve:
    return forecast(str(toy), quiet(calibration=text), [Budget.parse("100KB"), 3.5])


def test_plans_are_judged_by_divergence_and_by_what_follows(loaded, text):
    problem = unmeasured(*loaded, calibration=text)
    plans = [{t.path: Precision(bits, 64) for t in problem.tensors} for bits in (2, 8)]
    found = compare(problem, plans)
    assert [each.kl for each in found] == pytest.approx(end_to_end(problem, plans), rel=1e-6)
    tokens = problem.calibration.held_out

    def log_probs():
        logits = np.array(problem.model(mx.array(tokens)), np.float64)[:, :-1]
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        return np.take_along_axis(logits, tokens[:, 1:, None], -1)

    before = log_probs()
    for plan, each in zip(plans, found, strict=True):
        with problem.quantized(plan):
            ratio = math.exp((before - log_probs()).mean())
        assert each.perplexity_ratio == pytest.approx(ratio, rel=1e-4)
    assert abs(found[1].perplexity_ratio - 1) < abs(found[0].perplexity_ratio - 1)


def test_a_forecast_holds_the_plans_of_conversions(toy, text, curve):
    assert [point.name for point in curve.plans] == ["3.5", "100KB"]
    for point, budget in zip(curve.plans, (3.5, Budget.parse("100KB")), strict=True):
        plan = plan_folder(str(toy), quiet(calibration=text, budget=budget))
        assert point.plan is not None
        assert point.plan.precisions == plan.precisions
        assert point.kl == point.expected == pytest.approx(plan.kl, rel=1e-6)
    sizes = [point.file_bytes for point in curve.uniforms]
    assert [point.name for point in curve.uniforms][:2] == ["2-bit g64", "3-bit g64"]
    assert sizes == sorted(sizes)
    assert curve.plans[1].file_bytes <= 100_000 < curve.original


def test_pins_hold_in_a_forecast(toy, text):
    pins = (Pin.parse("*.v_proj=8g64"), Pin.parse("model.embed_tokens=16"))
    (point,) = forecast(str(toy), quiet(calibration=text, pins=pins), [12.0]).plans
    assert point.plan is not None
    assert point.plan.precisions["model.layers.1.self_attn.v_proj"] == Precision(8, 64)
    assert point.plan.precisions["model.embed_tokens"] == Precision(16, 0)


@pytest.mark.parametrize("stream", ["0", "1"])
def test_with_refinement_it_says_what_is_expected_to_be_left(toy, text, monkeypatch, stream):
    monkeypatch.setenv("MLX_OPTIQ_EXT_STREAM", stream)
    found = forecast(str(toy), quiet(calibration=text, effort="refine"), [4.5])
    (point,) = found.plans
    assert point.plan is not None
    assert point.expected == pytest.approx(sum(point.plan.sensitivities.values()))
    assert 0 < point.expected < point.kl
    assert found.expense.further > 0
    assert found.expense.memory > 0
    said = summary(found)
    assert f"Expected after refinement: KL {point.expected:.4g} nats per token" in said
    assert "a conversion takes" in said


def test_a_model_that_has_no_layers_at_hand_is_read_layer_by_layer(text, tmp_path, monkeypatch):
    deep = write_toy(tmp_path / "deep", layers=4)
    whole = forecast(str(deep), quiet(calibration=text), [4.0])
    monkeypatch.setenv("MLX_OPTIQ_EXT_STREAM", "1")
    read = forecast(str(deep), quiet(calibration=text), [4.0])
    assert read.plans[0].kl == pytest.approx(whole.plans[0].kl, rel=0.05)


def test_nothing_and_what_cannot_be_are_refused_before_anything_is_measured(toy, text, monkeypatch):
    with pytest.raises(InputError, match="a forecast needs a budget"):
        forecast(str(toy), quiet(calibration=text), [])
    lines: list[str] = []
    request = replace(quiet(calibration=text), say=lines.append)
    for budgets in ([4.5, 1.0], [Budget.parse("1GB")]):
        with pytest.raises(BudgetError, match=r"too small|is more than the"):
            forecast(str(toy), request, budgets)
    monkeypatch.setenv("MLX_OPTIQ_EXT_STREAM", "1")
    with pytest.raises(InputError, match="distillation holds the whole model"):
        forecast(str(toy), replace(request, effort="distill"), [4.5])
    assert lines == []


def test_the_drawing_holds_every_figure_and_no_strange_markup(curve):
    name = '</title><script>alert("x")</script> & co'
    picture = ElementTree.fromstring(drawn(replace(curve, name=name)))
    space = {"svg": "http://www.w3.org/2000/svg"}
    assert picture.find(".//svg:script", space) is None
    plans = picture.findall(".//svg:path[@class='plan']", space)
    values = {(int(p.attrib["data-bytes"]), float(p.attrib["data-value"])) for p in plans}
    for point in curve.plans:
        assert {(point.file_bytes, point.kl), (point.file_bytes, point.perplexity_ratio)} <= values
    circles = picture.findall(".//svg:circle", space)
    assert {int(c.attrib["data-bytes"]) for c in circles} <= {p.file_bytes for p in curve.uniforms}
    assert circles
    words = " ".join(text.text or "" for text in picture.findall(".//svg:text", space))
    for word in ("KL, nats per token", "perplexity over that of the original", "100KB", "3.5"):
        assert word in words


@pytest.fixture
def command_of(command, toy, text, tmp_path):
    """Runs convert with some words and returns what it said, if it wrote no model."""

    def command_of(*words):
        out = tmp_path / "out"
        source = ("--hf-path", toy, "--mlx-path", out, "--optiq-calibration", text)
        done = command("convert", *source, *words)
        assert done.status == 0, done.err
        assert not out.exists()
        return done.out

    return command_of


def test_a_dry_run_says_the_plan_and_writes_nothing(command_of, tmp_path):
    before = sorted(tmp_path.iterdir())
    said = command_of("--optiq-budget", "100KB", "--optiq-dry-run", *PLAIN)
    assert "bits per weight of a budget of 100KB: " in said
    assert "[optiq] Weight files: " in said
    assert "[optiq] Expected: KL " in said
    assert "perplexity x " in said
    assert "[optiq] Planned in " in said
    assert "GiB of memory" in said
    assert said.rstrip().endswith("[optiq] Nothing was converted")
    written = set(tmp_path.iterdir()) - set(before)
    assert {path.name for path in written} <= {"cache"}


def test_several_budgets_are_a_table_and_a_drawing(command_of, tmp_path):
    picture = tmp_path / "curve.svg"
    said = command_of("--optiq-budget", "40%,20%,30%", "--optiq-report", picture, *PLAIN)
    lines = [line.removeprefix("[optiq] ") for line in said.splitlines()]
    (head,) = (n for n, line in enumerate(lines) if line.startswith("budget "))
    names = [line.split("  ")[0] for line in lines[head + 1 : head + 10]]
    assert [name for name in names if name.endswith("%")] == ["20%", "30%", "40%"]
    assert {"uniform 3-bit g64", "uniform 4-bit g64"} <= set(names)
    assert "each conversion takes" in said
    assert ElementTree.fromstring(picture.read_text()).tag.endswith("svg")


def test_what_a_dry_run_expects_is_what_the_conversion_comes_to(command, command_of, toy, text):
    said = command_of("--optiq-budget", "4", "--optiq-dry-run", *PLAIN)
    words = ("--hf-path", toy, "--mlx-path", "made", "--optiq-calibration", text, *PLAIN)
    done = command("convert", *words, "--optiq-budget", "4")
    assert done.status == 0, done.err
    assert "Reading the measurements of" in done.out
    kl = json.loads(Path("made", "optiq_metadata.json").read_text())["kl"]
    assert f"Expected: KL {kl:.4g} nats per token" in said
    made = mlx_lm.load("made")[0]
    assert made is not None


def test_a_detector_takes_one_budget(command, tmp_path):
    words = ("--hf-path", tmp_path / "yolo26n.pt", "--optiq-model-type", "yolo")
    done = command("convert", *words, "--optiq-budget", "5,6", "--optiq-calibration", tmp_path)
    assert done.status == 2
    assert "takes no budget of 5,6: give one number" in done.err.splitlines()[-1]
