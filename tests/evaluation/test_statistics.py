"""Errors, tests and tables."""

import json
import math

import numpy as np
import pytest

from mlx_optiq_ext.evaluation import token_divergence
from mlx_optiq_ext.evaluation.report import Figures, Report
from mlx_optiq_ext.evaluation.statistics import clustered_error, mcnemar, proportion_error


def test_errors_over_sequences():
    rng = np.random.default_rng(0)
    alone = [rng.normal(size=50) for _ in range(40)]
    every = np.concatenate(alone)
    assert clustered_error(alone) == pytest.approx(every.std() / math.sqrt(len(every)), rel=0.3)
    # Equal values of one sequence count once.
    together = [np.full(50, value) for value in rng.normal(size=40)]
    expected = np.std([w[0] for w in together], ddof=1) / math.sqrt(40)
    assert clustered_error(together) == pytest.approx(expected)
    single = rng.normal(size=100)
    assert clustered_error([single]) == pytest.approx(single.std(ddof=1) / 10)
    assert math.isnan(clustered_error([np.ones(1)]))


def test_the_error_of_a_share_is_lm_evals():
    from lm_eval.api.metrics import mean_stderr  # pyright: ignore[reportMissingImports]

    hits = [True] * 7 + [False] * 13
    assert proportion_error(hits) == pytest.approx(mean_stderr([float(h) for h in hits]))


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    # Two-sided binomial tails of n, k: 2 (C(n,0) + .. + C(n,k)) / 2^n.
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (8, 2, 2 * 56 / 1024), (3, 3, 1.0)],
)
def test_mcnemars_exact_test(better, worse, p):
    first = [True] * better + [False] * worse + [True] * 4 + [False] * 3
    second = [False] * better + [True] * worse + [True] * 4 + [False] * 3
    assert mcnemar(first, second) == (better, worse, pytest.approx(p))
    assert mcnemar(second, first)[2] == pytest.approx(p)


def test_figures_that_are_rounding_are_printed_as_that(tmp_path):
    figures = {"mean": -3e-8, "max": 2e-6, "error": 0.0, "rms_probability_change": 5e-5}
    column: dict[str, Figures] = {"a": {**figures, "edits": math.inf}}
    report = Report("kl", "text.txt", {}, column, noise=token_divergence.NOISE)
    table, data = report.write(tmp_path, "name")
    rows = {line.split(" | ")[0]: line for line in table.read_text().splitlines()}
    assert rows["| mean"] == "| mean | < 1e-6 |"
    assert rows["| error"] == "| error | < 1e-6 |"
    assert rows["| max"] == "| max | 2e-06 |"
    assert rows["| rms probability change"] == "| rms probability change | < 1e-4 |"
    assert rows["| edits"] == "| edits | inf |"
    loaded = json.loads(data.read_text())
    assert loaded["columns"]["a"]["mean"] == -3e-8
    assert loaded["columns"]["a"]["edits"] is None
    assert loaded["noise"]["mean"] == 1e-6


def test_a_report_is_a_table_and_json(tmp_path):
    columns: dict[str, Figures] = {
        "a": {"mean": 0.012345, "file_bytes": 1234567.0},
        "b": {"p": float("nan")},
    }
    report = Report("kl", "text.txt", {"sequences": 2}, columns, ("A note.",), {"mlx": "1"})
    table, data = report.write(tmp_path / "new", "name")
    assert "| mean | 0.01235 |  |" in table.read_text()
    assert "| file bytes | 1 234 567 |" in table.read_text()
    assert "n/a" in table.read_text()
    loaded = json.loads(data.read_text())
    assert loaded["columns"]["a"]["mean"] == 0.012345
    assert loaded["columns"]["b"]["p"] is None
