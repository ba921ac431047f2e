"""The page of --optiq-report: its markup, and that its numbers are those of the plan."""

import dataclasses
import math
from collections import Counter
from pathlib import Path

import pytest

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.weights import Precision, report, search
from mlx_optiq_ext.weights.report import gather
from mlx_optiq_ext.weights.report.words import nats, percent, ratio, size

from .markup import Markup

NAME = """</title></h1><script>alert("x")</script> & 'co' {{ 7 * 7 }}{% raw %}"""
MARKUP = '"><img src=x onerror=alert(1)></svg><b a="1">&{{ 7 * 7 }}'


def number(value: str | None) -> float:
    assert value is not None
    return float(value)


def test_every_tensor_has_one_cell_with_the_numbers_of_the_plan(evidence):
    cells, plan = Markup(report.report(evidence)).cells(), evidence.plan
    assert list(cells) == sorted(plan.precisions, key=list(cells).index)
    for tensor in evidence.tensors:
        cell, precision = cells[tensor.path], plan.precisions[tensor.path]
        assert (cell["data-bits"], cell["data-group-size"]) == (
            str(precision.bits),
            str(precision.group_size),
        )
        assert number(cell["data-sensitivity"]) == plan.sensitivities[tensor.path]
        title = cell["title"] or ""
        assert tensor.path in title
        assert " × ".join(map(str, tensor.shape)) in title  # noqa: RUF001
        assert nats(plan.sensitivities[tensor.path]) in title
        assert f"{tensor.stored_bits(precision) / tensor.size:.2f}" in title


def test_layers_are_rows_and_projections_are_columns(evidence):
    page = Markup(report.report(evidence))
    (heat, _), *others = page.all("table", **{"class": "heat"})
    assert heat
    assert others == []
    text = "".join(page.all("table", **{"class": "heat"})[0][1].split())
    assert text.startswith("layer" + "self_attnq_projself_attnk_proj")
    assert "model.embed_tokens" in page.all("table", **{"class": "data plain outside"})[0][1]
    rows = [a for a, _ in page.all("th") if a == {}]
    assert len(rows) >= len(set(evidence.layers.values()))


def test_the_table_and_the_chart_hold_what_was_judged(evidence):
    page, bpw = Markup(report.report(evidence)), evidence.size.bits_per_weight
    expected = {(bpw(j.stored_bits), j.kl) for j in evidence.references}
    drawn = {
        (number(a["data-bpw"]), number(a["data-kl"]))
        for a, _ in page.all("circle", **{"class": "uniform"})
    }
    assert drawn == expected
    (mine, _), *others = page.all("path", **{"class": "plan"})
    assert others == []
    assert number(mine["data-bpw"]) == evidence.plan.achieved_bpw
    assert number(mine["data-kl"]) == evidence.kl
    rows = {
        (number(a["data-bpw"]), number(a["data-kl"])): text
        for a, text in page.all("tr")
        if "data-bpw" in a
    }
    plan = (evidence.plan.achieved_bpw, evidence.kl)
    assert set(rows) == {*expected, plan, (bpw(evidence.unquantized_bits), 0.0)}
    total = evidence.plan.achieved_bpw * evidence.size.parameters / 8
    assert f"{round(total):,}" in rows[plan]
    assert nats(evidence.kl) in rows[plan]


def test_the_head_says_what_was_asked_and_what_came_of_it(evidence):
    text = "".join(Markup(report.report(evidence)).all("header")[0][1])
    plan = evidence.plan
    for word in ("toy", f"{plan.achieved_bpw:.3f}", "budget: 4", plan.method, plan.variant):
        assert word in text
    for name, version in plan.versions.items():
        assert f"{name} {version}" in text
    assert f"calibration.txt, {plan.calibration['sequences']} sequences" in text
    assert nats(evidence.kl) in text


def test_the_head_names_the_uniform_packings_on_both_sides_and_the_text(evidence):
    page, plan = Markup(report.report(evidence)), evidence.plan
    tiles = [" ".join(text.split()) for _, text in page.all("div", **{"class": "tile"})]
    assert plan.below is not None
    assert plan.above is not None
    assert plan.below.bpw <= plan.target_bpw < plan.above.bpw
    for side, uniform in (("below", plan.below), ("above", plan.above)):
        (tile,) = [t for t in tiles if t.endswith(f"the nearest {side} the budget")]
        assert f"at {uniform.bpw:.3f} bits per weight" in tile
        assert tile.startswith(ratio(plan.kl, uniform.kl).replace("\N{NO-BREAK SPACE}", " "))
        assert uniform.precision in {j.precision for j in evidence.references}
    assert any("on text of calibration.txt, nats per token" in tile for tile in tiles)
    drawn = dataclasses.replace(plan, calibration={"source": "sampled from the model"})
    page = report.report(dataclasses.replace(evidence, plan=drawn))
    assert "on text sampled from the model itself, nats per token" in page


def test_the_curve_falls_and_holds_every_tensor(evidence):
    page = Markup(report.report(evidence))
    points = [a for a, _ in page.all("g") if "data-sensitivity" in a]
    values = [number(a["data-sensitivity"]) for a in points]
    assert values == sorted(values, reverse=True)
    assert {a["data-path"] for a in points} == set(evidence.plan.precisions)
    for point, value in zip(points, values, strict=True):
        assert evidence.sensitivity[point["data-path"] or ""][evidence.common] == value


def test_tensors_above_the_average_are_listed_with_their_reason(evidence):
    page, plan = Markup(report.report(evidence)), evidence.plan
    above = {
        t.path
        for t in evidence.tensors
        if t.stored_bits(plan.precisions[t.path]) / t.size > evidence.average
    }
    rows = {a["data-path"]: text for a, text in page.all("tr") if "data-path" in a}
    assert set(rows) == above
    assert 0 < len(above) < len(evidence.tensors)
    for gain in evidence.gains:
        row = rows[gain.tensor.path]
        assert gain.sensitivity == evidence.sensitivity[gain.tensor.path][evidence.common]
        assert gain.share == pytest.approx(gain.sensitivity / evidence.total_sensitivity)
        assert f"{gain.extra_bits:+,}" in row
        assert percent(gain.share) in row
        assert row.endswith(".")
    shares = [value / evidence.total_sensitivity for _, value in evidence.curve]
    assert math.fsum(shares) == pytest.approx(1)


def test_names_are_escaped_everywhere(evidence):
    tensors = tuple(
        dataclasses.replace(
            t, path=f'{t.path}"><img src=x onerror=alert(1)></svg><b a="1">&{{ 7 * 7 }}'
        )
        if t.path.endswith("_proj")
        else t
        for t in evidence.tensors
    )
    renamed = {old.path: new.path for old, new in zip(evidence.tensors, tensors, strict=True)}
    plan = dataclasses.replace(
        evidence.plan,
        precisions={renamed[k]: v for k, v in evidence.plan.precisions.items()},
        sensitivities={renamed[k]: v for k, v in evidence.plan.sensitivities.items()},
        method=NAME,
        variant=NAME,
        calibration={**evidence.plan.calibration, "source": NAME},
        versions={NAME: NAME},
    )
    odd = dataclasses.replace(
        evidence,
        name=NAME,
        plan=plan,
        tensors=tensors,
        layers={renamed.get(k, k): v for k, v in evidence.layers.items()},
        sensitivity={renamed[k]: v for k, v in evidence.sensitivity.items()},
    )
    plain, page = Markup(report.report(evidence)), Markup(report.report(odd))
    assert [tag for tag, *_ in page.elements] == [tag for tag, *_ in plain.elements]
    assert set(page.cells()) == set(renamed.values())
    assert page.all("h1")[0][1] == NAME
    assert page.all("script") == page.all("img") == []
    assert "49" not in page.all("h1")[0][1]


def test_nothing_is_loaded_from_elsewhere(evidence):
    page = report.report(evidence)
    assert "http://" not in page
    assert "https://" not in page
    assert "url(" not in page
    assert "@import" not in page
    tags = Counter(tag for tag, *_ in Markup(page).elements)
    assert not tags.keys() & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert not any("src" in found or "href" in found for _, found, _ in Markup(page).elements)


@pytest.mark.parametrize("budget", [2.6, 7.0, 15.9])
def test_extreme_budgets_and_a_lossless_plan_have_a_page(study, budget):
    found = gather(study, search(study, budget), "toy")
    assert set(Markup(report.report(found)).cells()) == set(found.plan.precisions)


def test_a_model_without_any_loss_has_a_page_without_charts(evidence):
    flat = {path: dict.fromkeys(values, 0.0) for path, values in evidence.sensitivity.items()}
    plan = dataclasses.replace(
        evidence.plan,
        kl=0.0,
        below=evidence.plan.below and dataclasses.replace(evidence.plan.below, kl=0.0),
        sensitivities=dict.fromkeys(evidence.plan.sensitivities, 0.0),
    )
    none = tuple(dataclasses.replace(j, kl=0.0) for j in evidence.uniforms)
    odd = dataclasses.replace(evidence, plan=plan, sensitivity=flat, uniforms=none)
    page = Markup(report.report(odd))
    assert page.all("svg") == []
    assert set(page.cells()) == set(plan.precisions)


def test_a_refined_plan_says_so(evidence):
    assert "refined" in report.report(dataclasses.replace(evidence, refined=True))
    assert "refined" not in report.report(evidence)


def test_a_tensor_that_the_model_keeps_says_so(evidence):
    first = next(t for t in evidence.tensors if t.path.endswith("down_proj"))
    own = Precision(8, 64)
    kept = dataclasses.replace(first, precisions=(own,), own=own)
    plan = dataclasses.replace(
        evidence.plan, precisions={**evidence.plan.precisions, first.path: own}
    )
    odd = dataclasses.replace(
        evidence,
        tensors=tuple(kept if t is first else t for t in evidence.tensors),
        plan=plan,
        sensitivity={**evidence.sensitivity, first.path: {own: 1e-6}},
    )
    rows = {a["data-path"]: t for a, t in Markup(report.report(odd)).all("tr") if "data-path" in a}
    assert "The model's own code asks for at least 8" in rows[first.path]


def test_bad_targets_are_refused_with_a_remedy(tmp_path):
    (tmp_path / "folder.html").mkdir()
    for name, words in {
        "missing/plan.html": "does not exist, create it",
        "folder.html": "is a folder: name a file",
        "plan.safetensors": "ends in .html",
        "plan": "ends in .html",
    }.items():
        with pytest.raises(InputError, match=words):
            report.check_target(tmp_path / name)
    report.check_target(tmp_path / "plan.html")
    report.check_target(Path("plan.html"))


def test_the_page_is_written_whole(evidence, tmp_path):
    path = tmp_path / "plan.html"
    path.write_text("old")
    report.write(path, evidence)
    assert path.read_text(encoding="utf-8") == report.report(evidence)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="cannot write the report"):
        report.write(tmp_path / "missing" / "plan.html", evidence)


def test_numbers_read_well():
    assert [nats(v) for v in (0, 0.0673, 0.01, 12.3, 1234.5)] == [
        "0",
        "0.0673",
        "0.0100",
        "12.3",
        "1,234",
    ]
    assert nats(4.35e-5).endswith("10⁻⁵")
    assert [size(b).split()[0] for b in (8e3, 8e6, 4e11)] == ["1.00", "1.00", "50.00"]
    assert percent(0.0712).split() == ["7.1", "%"]
