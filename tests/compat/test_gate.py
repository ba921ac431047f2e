"""Verdicts and feature states, the installed version, and the cost of asking."""

import subprocess
import sys
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

import mlx_optiq_compat
from mlx_optiq_compat import (
    feature,
    features,
    installed_mlx,
    installed_version,
    rows,
    verdict,
)
from mlx_optiq_compat.version import release, within


@pytest.mark.parametrize(
    ("version", "kind"),
    [
        ("0.28.4", "outside"),
        ("0.30.0", "outside"),
        ("0.30.2", "outside"),
        ("0.30.3", "outside"),
        ("0.30.2.post1", "outside"),
        ("0.30.4", "pinned"),
        ("0.31.0", "untested"),
        ("0.31.3", "pinned"),
        ("0.32.2", "pinned"),
        ("0.32.1.post1", "untested"),
        ("0.32.2.dev0", "untested"),
        ("0.32.2+local", "untested"),
        ("0.32.10", "untested"),
        ("0.33", "untested"),
        ("0.33.0.dev1", "untested"),
        ("0.33.0rc1", "untested"),
        ("1.0.0", "untested"),
        ("", "outside"),
        ("unknown", "outside"),
    ],
)
def test_verdict_of_a_version(version, kind):
    given = verdict(version)
    assert (given.version, given.kind) == (version, kind)
    assert version in given.reason


@pytest.mark.parametrize(
    ("version", "mlx", "kind", "reason"),
    [
        ("0.32.2", "0.32.4", "pinned", "is tested with mlx 0.32.4"),
        ("0.32.2", "0.32.2", "pinned", "is tested with mlx 0.32.4"),
        ("0.32.2", "0.32.5", "untested", "; mlx 0.32.5 is newer and untested"),
        ("0.32.2", "0.33.0.dev1", "untested", "; mlx 0.33.0.dev1 is newer and untested"),
        ("0.32.2", "0.31.2", "outside", "run with mlx 0.31.2: pip install 'mlx>=0.32.2'"),
        ("0.31.2", "0.31.1", "pinned", "is tested with mlx 0.31.1"),
        ("0.31.2", "0.32.0", "outside", "mlx 0.32.0 (the server hangs): pip install 'mlx>=0.30.4,"),
        ("0.30.4", "0.32.4", "outside", "mlx 0.32.4 (the server hangs): pip install 'mlx>=0.30.3,"),
        ("0.30.4", "0.29.0", "outside", "does not run with mlx 0.29.0: pip install"),
        ("0.31.2.post1", "0.32.4", "outside", "mlx-lm 0.31.2.post1 does not run with mlx 0.32.4"),
        ("0.31.0", "0.31.2", "outside", "does not run with mlx 0.31.2"),
        ("0.33.0", "0.40.0", "untested", "mlx-lm 0.33.0 is untested (tested: "),
        ("0.30.2", "0.40.0", "outside", "older than 0.30.4"),
        ("0.32.2", "built here", "untested", "mlx's version 'built here' cannot be read"),
        ("0.32.2", None, "pinned", "is tested with mlx 0.32.4"),
    ],
)
def test_the_mlx_beside_it_is_part_of_the_verdict(version, mlx, kind, reason):
    given = verdict(version, mlx)
    assert given.kind == kind
    assert reason in given.reason
    weights = feature("weights", version, mlx)
    assert weights.on is (kind != "outside")
    assert weights.reason == given.reason


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.mlx_lm)
def test_every_row_runs_with_the_mlx_it_was_tested_with(row):
    assert within(row.tested_mlx, row.mlx)
    assert verdict(row.mlx_lm, row.tested_mlx).kind == row.verdict
    assert bool(row.beyond) is ("<" in row.mlx)


def test_a_range_that_is_no_range_is_an_error():
    with pytest.raises(ValueError, match="not a bound: '==1'"):
        within("1", ">=0,==1")


def test_the_installed_mlx_is_the_one_that_runs():
    import mlx.core as mx

    running: Any = mx
    assert installed_mlx() == running.__version__.partition("+")[0]


def test_a_short_version_is_the_release_it_abbreviates():
    assert verdict("0.32").kind == "pinned"


def test_releases_compare_as_numbers_and_not_as_text():
    assert release("0.9.9") < release("0.10.0") < release("0.32.2") < release("0.32.10")
    assert release("0.33.0.dev1") == release("0.33") == (0, 33, 0)
    with pytest.raises(ValueError, match="not a version: 'main'"):
        release("main")


def test_reasons_name_what_was_tested():
    assert verdict("0.31.3").reason == (
        "mlx-lm 0.31.3 is tested with mlx 0.31.2 and transformers 5.23.0"
    )
    assert verdict("0.33.0").reason == "mlx-lm 0.33.0 is untested (tested: 0.30.4 to 0.32.2)"
    assert verdict("0.30.2").reason == (
        "mlx-lm 0.30.2 is older than 0.30.4, the oldest release supported"
    )


@pytest.mark.parametrize("name", [each.name for each in features()])
def test_every_feature_is_on_in_the_newest_row_and_off_outside(name):
    assert feature(name, "0.32.2").on
    assert feature(name, "0.33.0.dev1").on
    assert not feature(name, "0.30.2").on
    assert feature(name, "0.30.2").reason == verdict("0.30.2").reason


@pytest.mark.parametrize("name", [each.name for each in features()])
@pytest.mark.parametrize("version", ["0.30.6", "0.31.0", "0.31.3"])
def test_batching_needs_the_newer_engine_and_nothing_else_does(name, version):
    assert feature(name, version).on == (not name.endswith("_batched") and name != "prompts")


def test_several_ranks_need_a_server_that_splits_a_model():
    assert feature("sharded", "0.30.6").on
    state = feature("sharded", "0.30.4")
    assert not state.on
    assert "lacks a server that splits a model over ranks: needs 0.30.6 or newer" in state.reason


def test_an_off_feature_says_what_is_missing_and_what_would_turn_it_on():
    state = feature("kv_batched", "0.31.3")
    assert not state.on
    assert state.reason == (
        "mlx-lm 0.31.3 lacks a batch engine that keeps each row's cache and adapter: "
        "needs 0.32.0 or newer; below that, requests run one at a time"
    )


def test_an_unknown_feature_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown feature 'kv_cache'; known: weights, .*latency"):
        feature("kv_cache", "0.32.2")


def test_results_are_frozen():
    with pytest.raises(FrozenInstanceError):
        verdict("0.32.2").kind = "outside"  # pyright: ignore[reportAttributeAccessIssue]


def test_public_names_all_exist_and_unknown_ones_do_not():
    assert all(getattr(mlx_optiq_compat, name) for name in mlx_optiq_compat.__all__)
    assert set(mlx_optiq_compat.__all__) <= set(dir(mlx_optiq_compat))
    with pytest.raises(AttributeError, match="no attribute 'verdicts'"):
        _ = mlx_optiq_compat.verdicts  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_loads_nothing_else():
    code = (
        "import sys; before = set(sys.modules); import mlx_optiq_compat;"
        "print(*sorted(set(sys.modules) - before - {'__future__'}))"
    )
    # -I -S: without site no .pth file runs first; the path is given instead.
    source = mlx_optiq_compat.__path__[0].rpartition("mlx_optiq_compat")[0]
    code = f"import sys; sys.path.insert(0, {source!r}); {code}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["mlx_optiq_compat"]


def test_asking_for_the_version_imports_neither_mlx_lm_nor_a_parser():
    code = (
        "import sys, mlx_optiq_compat as c; c.installed_version();"
        "heavy = {'mlx_lm', 'mlx', 'tomllib', 'ast', 'importlib.metadata', 'dataclasses'};"
        "print(*heavy & set(sys.modules))"
    )
    source = mlx_optiq_compat.__path__[0].rpartition("mlx_optiq_compat")[0]
    code = f"import sys; sys.path.insert(0, {source!r}); {code}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_installed_version_is_that_of_the_metadata():
    from importlib.metadata import version

    assert installed_version() == version("mlx-lm")
