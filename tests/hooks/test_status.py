"""status(): versions, the verdict, the features and every patch."""

from pathlib import Path

import pytest

import mlx_optiq_hooks
from mlx_optiq_compat import rows
from mlx_optiq_hooks import tables

VERDICTS = {
    "0.32.2": "mlx-lm 0.32.2: pinned (mlx-lm 0.32.2 is tested with mlx ",
    "0.99.0": "mlx-lm 0.99.0: untested (mlx-lm 0.99.0 is untested (tested: ",
    "0.29.1": "mlx-lm 0.29.1: outside (mlx-lm 0.29.1 is older than ",
}
STATUS = "import mlx_optiq_ext; print(mlx_optiq_ext.status(verbose=True))"
SHORT = "import mlx_optiq_ext; print(mlx_optiq_ext.status())"


def entries(text):
    """The indented lines of a status, by what stands before their first colon and space."""
    lines = [line.strip().split(": ", 1) for line in text.splitlines() if line.startswith("  ")]
    return {line[0]: line[1] for line in lines}


@pytest.mark.parametrize("version", VERDICTS)
def test_status_gives_the_verdict_and_each_features_state(run, fake_mlx_lm, version):
    text = run("python", "-c", STATUS, env=fake_mlx_lm(version), check=True).stdout
    assert f"\n{VERDICTS[version]}" in text
    on = version != "0.29.1"
    assert entries(text)["flags"] == "on (options are parsed and refused if off)"
    for feature in ("weights", "plugins"):
        assert entries(text)[feature].startswith("on (" if on else "off (mlx-lm 0.29.1 is older")
    assert ("mlx_lm.utils:quantize_model" in entries(text)) is on


def test_status_names_this_package_and_those_it_stands_on(run, fake_mlx_lm):
    from importlib.metadata import version

    lines = run("python", "-c", SHORT, env=fake_mlx_lm(), check=True).stdout.splitlines()
    assert lines[0].startswith(f"mlx-optiq-ext {version('mlx-optiq-ext')}, Python 3.")
    assert f", wrapt {version('wrapt')}, pluggy {version('pluggy')}" in lines[1]
    assert "start-up file (.pth): ran" in lines
    assert "plugins: optiq" in lines


def test_status_says_that_the_pth_did_not_run_and_what_to_do(run, fake_mlx_lm):
    code = "import mlx_optiq_ext; mlx_optiq_ext._activation.sources.remove('site')\n" + STATUS
    text = run("python", "-c", code, env=fake_mlx_lm(), check=True).stdout
    assert "start-up file (.pth): did not run (import mlx_optiq_ext before mlx_lm;" in text
    assert "chflags -R nohidden" in text


def test_status_tells_waiting_from_live_patches(run, fake_mlx_lm):
    code = f"import mlx_lm.utils; {STATUS}"
    found = entries(run("python", "-c", code, env=fake_mlx_lm(), check=True).stdout)
    assert found["mlx_lm.utils:quantize_model"].startswith("live (")
    assert found["mlx_lm.convert:convert"].startswith("live (")
    assert found["mlx_lm.server:main"].startswith("waiting for its import (")


def test_status_shows_a_patch_that_somebody_replaced(run, fake_mlx_lm):
    code = f"import mlx_lm.utils; mlx_lm.utils.quantize_model = print; {STATUS}"
    found = entries(run("python", "-c", code, env=fake_mlx_lm(), check=True).stdout)
    assert found["mlx_lm.utils:quantize_model"].startswith("NOT live (")


def test_status_says_why_a_feature_failed(run, fake_mlx_lm):
    env = fake_mlx_lm()
    Path(env["PYTHONPATH"], "mlx_lm", "tuner", "trainer.py").write_text("# nothing here\n")
    code = f"import mlx_lm.tuner.trainer, mlx_lm.tuner.utils; {STATUS}"
    found = entries(run("python", "-c", code, env=env, check=True).stdout)
    assert found["lora"].startswith("off (lora needs a patch that failed (mlx_lm.tuner.trainer:")
    assert found["weights"].startswith("on (")
    assert found["mlx_lm.tuner.utils:load_adapters"].startswith("NOT live (")


def test_status_says_that_the_switch_is_off(run, fake_mlx_lm):
    env = {**fake_mlx_lm(), "MLX_OPTIQ_EXT": "0"}
    text = run("python", "-c", STATUS, env=env, check=True).stdout
    assert "switched off: MLX_OPTIQ_EXT=0 is set, mlx-lm runs as stock" in text
    assert "patches:" not in text


def test_ten_lines_say_what_matters(run):
    lines = run("python", "-m", "mlx_optiq_ext", check=True).stdout.splitlines()
    assert len(lines) <= 10
    assert {"features", "plugins"} <= {line.partition(":")[0] for line in lines}
    assert not any("mlx_lm.convert:main" in line for line in lines)


def test_features_that_are_off_stand_together_under_their_reason(run, fake_mlx_lm):
    text = run("python", "-c", SHORT, env=fake_mlx_lm("0.29.1"), check=True).stdout
    assert len(text.splitlines()) <= 10
    assert "\nfeatures: flags\n  weights, kv, kv_batched, " in text
    assert text.count("(mlx-lm 0.29.1 is older than ") == 2


ERRORS = {
    "AttributeError: module 'mlx.core' has no attribute 'new'": (
        "raise AttributeError(\"module 'mlx.core' has no attribute 'new'\")"
    ),
    "ImportError: libmlx.so: cannot open": "raise ImportError('libmlx.so: cannot open')",
    "SystemExit: not here": "raise SystemExit('not here')",
}


@pytest.mark.parametrize("reason", ERRORS)
def test_the_status_survives_an_mlx_lm_that_does_not_import(run, fake_mlx_lm, reason):
    env = fake_mlx_lm()
    Path(env["PYTHONPATH"], "mlx_lm", "__init__.py").write_text(ERRORS[reason] + "\n")
    done = run("python", "-m", "mlx_optiq_ext", env=env, check=True)
    assert f": off (mlx-lm does not import: {reason})\n" in done.stdout
    assert "\nfeatures: none\n" in done.stdout
    assert done.stderr == ""


def test_a_module_that_does_not_import_is_named(run, fake_mlx_lm):
    env = fake_mlx_lm()
    Path(env["PYTHONPATH"], "mlx_lm", "server.py").write_text("1 / 0\n")
    text = run("python", "-m", "mlx_optiq_ext", env=env, check=True).stdout
    assert "  mlx_lm.server does not import: ZeroDivisionError: division by zero\n" in text


@pytest.mark.parametrize(
    ("blocked", "off"),
    [
        ("kv", ["kv", "kv_batched"]),
        ("plugins", ["kv", "kv_batched", "prompts", "plugins"]),
        ("adapters", ["adapters", "adapters_batched"]),
    ],
)
def test_a_feature_follows_those_that_it_needs(run, fake_mlx_lm, blocked, off):
    env = {**fake_mlx_lm(), "MLX_OPTIQ_EXT_BLOCK": blocked}
    text = run("python", "-c", SHORT, env=env, check=True).stdout
    assert f"\n  {', '.join(off)}: off ({blocked} is in MLX_OPTIQ_EXT_BLOCK: remove it)\n" in text


def test_unknown_names_in_the_block_list_are_said(run, fake_mlx_lm):
    env = {**fake_mlx_lm(), "MLX_OPTIQ_EXT_BLOCK": "kvv, lora,optiq-x"}
    done = run("python", "-c", SHORT, env=env, check=True)
    said = "MLX_OPTIQ_EXT_BLOCK names no feature and no installed plugin with 'kvv', 'optiq-x'; "
    assert f"\n  {said}" in done.stdout
    assert done.stderr.startswith(f"[optiq] {said}features are flags, weights, kv, ")
    assert done.stderr.count("\n") == 1


def test_every_patch_is_live_in_the_installed_mlx_lm(run):
    done = run("python", "-m", "mlx_optiq_ext", "--verbose", check=True)
    found = entries(done.stdout)
    waiting = {each for each, text in found.items() if text.startswith("waiting for its import")}
    # It needs lm-eval, and in older releases torch.
    imported = run("python", "-c", "import mlx_lm.evaluate", env={"MLX_OPTIQ_EXT": "0"})
    without = {"mlx_lm.evaluate"} if imported.returncode else set()
    assert {each.partition(":")[0] for each in waiting} == without
    gate = mlx_optiq_hooks.gate()
    targets = {patch.target for patch in tables() if gate.state(patch.feature).on}
    assert targets <= set(found)
    assert all(found[each].startswith("live (") for each in targets - waiting)
    assert [row for row in rows() if f"\nmlx-lm {row.mlx_lm}: {row.verdict} (" in done.stdout]
