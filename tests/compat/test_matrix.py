"""matrix.toml is well formed, and everything that must agree with it does."""

import re
import tomllib
from pathlib import Path

import pytest

from mlx_optiq_compat import features, markdown_table, rows
from mlx_optiq_compat.matrix import supported
from mlx_optiq_compat.version import release

ROOT = Path(__file__).resolve().parents[2]
RANGE = re.compile(r"(==|>=)\d+(\.\d+)*(rc\d+)?(,<\d+(\.\d+)*)?")


def test_rows_are_sorted_and_distinct():
    numbers = [release(row.mlx_lm) for row in rows()]
    assert numbers == sorted(set(numbers))


def test_rows_outside_come_before_the_supported_ones():
    kinds = [row.verdict == "outside" for row in rows()]
    assert kinds == sorted(kinds, reverse=True)
    assert set(row.verdict for row in rows()) <= {"pinned", "untested", "outside"}


def test_oldest_middle_and_newest_run_on_every_push():
    marked = [row.mlx_lm for row in rows() if row.ci]
    assert len(marked) == 3
    assert marked[0] == supported()[0].mlx_lm
    assert marked[-1] == supported()[-1].mlx_lm


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.mlx_lm)
def test_tested_versions_lie_in_the_ranges(row):
    for span, tested in ((row.mlx, row.tested_mlx), (row.transformers, row.tested_transformers)):
        assert RANGE.fullmatch(span), span
        lower, _, upper = span.partition(",<")
        if lower.startswith("=="):
            assert tested == lower[2:]
        else:
            assert release(tested) >= release(lower[2:])
        assert not upper or release(tested) < release(upper)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.mlx_lm)
def test_servers_that_share_a_stream_between_threads_exclude_the_mlx_that_refuses_it(row):
    # mlx#3727: mlx 0.31.2 made streams thread-local; mlx-lm 0.31.3 is the first to cope.
    assert row.mlx.endswith(",<0.31.2") == (release(row.mlx_lm) < (0, 31, 3))


@pytest.mark.parametrize("feature", features(), ids=lambda feature: feature.name)
def test_features_start_at_a_supported_release_and_say_why(feature):
    assert feature.since in {row.mlx_lm for row in supported()}
    late = feature.since != supported()[0].mlx_lm
    assert bool(feature.lacks) == late
    assert bool(feature.below) == late


def test_every_feature_of_the_design_is_there():
    expected = (
        "weights plugins lora modalities kv kv_batched adapters adapters_batched evaluation "
        "latency yolo sharded serving prompts"
    )
    assert {feature.name for feature in features()} == set(expected.split())


def test_requirement_starts_at_the_oldest_supported_row():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = (each for each in project["dependencies"] if each.startswith("mlx-lm"))
    assert re.findall(r">=([\d.]+)", requirement) == [supported()[0].mlx_lm]


@pytest.mark.parametrize("row", supported(), ids=lambda row: row.mlx_lm)
def test_every_supported_row_is_pinned_as_tested(row):
    text = (ROOT / "compat" / "constraints" / f"mlx-lm-{row.mlx_lm}.txt").read_text()
    pins = dict(line.split("==") for line in text.splitlines() if not line.startswith("#"))
    assert pins["mlx-lm"] == row.mlx_lm
    assert pins["mlx"] == pins["mlx-cpu"] == row.tested_mlx
    assert pins["transformers"] == row.tested_transformers
    assert {"wrapt", "pluggy", "safetensors", "numpy", "huggingface-hub"} <= set(pins)
    assert not {"pytest", "mlx-optiq-ext"} & set(pins)


def test_constraints_hold_no_file_without_a_row():
    names = {path.name for path in (ROOT / "compat" / "constraints").iterdir()}
    assert names == {f"mlx-lm-{row.mlx_lm}.txt" for row in supported()}


def test_markdown_table_has_a_line_per_release_newest_first():
    head, rule, *lines = markdown_table().splitlines()
    assert head.startswith("| mlx-lm | verdict | mlx | transformers | weights |")
    assert head.count("|") == rule.count("|") == 5 + sum(not each.planned for each in features())
    assert [line.split(" | ")[0] for line in lines] == [f"| {r.mlx_lm}" for r in reversed(rows())]
    assert all(line.count("|") == head.count("|") for line in lines)


def test_markdown_table_says_what_each_feature_does():
    cells = {line.split(" | ")[0]: line for line in markdown_table().splitlines()}
    built = [each for each in features() if not each.planned]
    assert cells["| 0.32.2"].count("| yes") == len(built)
    assert "yes" not in cells["| 0.30.2"]
    assert not any(each.title in markdown_table() for each in features() if each.planned)


def test_yolo_mlx_is_tested_within_its_range():
    data = tomllib.loads((ROOT / "compat" / "mlx_optiq_compat" / "matrix.toml").read_text())
    package = data["yolo_mlx"]
    lower, _, upper = package["mlx"].partition(",<")
    assert release(lower[2:]) <= release(package["tested_with"]["mlx"]) < release(upper)
    assert package["tested_with"]["mlx_lm"] in {row.mlx_lm for row in supported()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"yolo-mlx>={package['version']}" in project["optional-dependencies"]["yolo"]
