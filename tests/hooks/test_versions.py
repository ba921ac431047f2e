"""What happens on an mlx-lm release that is too old, unknown, or different where it counts."""

from pathlib import Path

import pytest

import mlx_optiq_compat as compat
import mlx_optiq_hooks
from mlx_optiq_ext.errors import UnsupportedError
from mlx_optiq_hooks.engine.gate import FEATURES, Gate

NEWEST_MLX = compat.rows()[-1].tested_mlx
ASK = ("python", "-m", "mlx_lm", "convert", "--hf-path", "no/such-model", "--optiq-budget", "4")


@pytest.fixture
def claim(monkeypatch):
    """Makes the installed mlx-lm, and the mlx beside it, claim other versions."""

    def claim(version, mlx=NEWEST_MLX):
        monkeypatch.setattr(compat, "installed_version", lambda: version)
        monkeypatch.setattr(compat, "installed_mlx", lambda: mlx)

    return claim


def test_a_flag_on_an_old_release_is_refused_with_the_reason(run, fake_mlx_lm):
    done = run(*ASK, env=fake_mlx_lm("0.29.1"))
    assert done.returncode == 2
    assert done.stderr.endswith(
        "error: mlx-lm 0.29.1 is older than 0.30.4, the oldest release supported\n"
    )
    assert done.stdout == ""


def test_without_a_flag_an_old_release_runs_as_stock_and_silently(run, fake_mlx_lm):
    done = run("python", "-m", "mlx_lm", "convert", env=fake_mlx_lm("0.29.1"), check=True)
    assert "'quant_predicate': None" in done.stdout
    assert done.stderr == ""


def test_a_flag_on_an_unknown_release_that_differs_is_refused_by_symbol(run, fake_mlx_lm):
    env = fake_mlx_lm("0.99.0")
    utils = Path(env["PYTHONPATH"], "mlx_lm", "utils.py")
    utils.write_text(utils.read_text().replace("quant_predicate=None", "predicates=()"))
    done = run(*ASK, env=env)
    assert done.returncode == 2
    assert (
        "error: mlx-lm 0.99.0 is untested and differs where weights needs it "
        "(mlx_lm.utils:quantize_model has changed: " in done.stderr
    )
    assert done.stderr.endswith("install a release from the compat table\n")


def test_a_missing_symbol_on_an_unknown_release_is_named(run, fake_mlx_lm):
    env = fake_mlx_lm("0.99.0")
    Path(env["PYTHONPATH"], "mlx_lm", "utils.py").write_text("from .utils_core import *\n")
    Path(env["PYTHONPATH"], "mlx_lm", "utils_core.py").write_text("quantize_model = print\n")
    done = run(*ASK, env=env)
    assert done.returncode == 2
    assert "(mlx_lm.utils:quantize_model is missing: " in done.stderr


def test_an_mlx_that_the_release_does_not_run_with_refuses_the_flag(run, fake_mlx_lm):
    env = fake_mlx_lm("0.31.2", "0.32.4")
    done = run(*ASK, env=env)
    assert done.returncode == 2
    assert done.stderr.endswith(
        "error: mlx-lm 0.31.2 does not run with mlx 0.32.4 (the server hangs): pip install "
        "'mlx>=0.30.4,<0.31.2', or a release of mlx-lm from the compat table that does\n"
    )
    assert done.stdout == ""
    code = "import mlx_optiq_ext; print(mlx_optiq_ext.status(verbose=True))"
    text = run("python", "-c", code, env=env, check=True).stdout
    assert "\nmlx-lm 0.31.2: outside (mlx-lm 0.31.2 does not run with mlx 0.32.4 (" in text
    assert "\n  weights: off (mlx-lm 0.31.2 does not run with mlx 0.32.4 (" in text


def test_a_release_without_a_name_that_a_patch_uses_has_the_feature_off(run, fake_mlx_lm):
    env = fake_mlx_lm("0.99.0")
    Path(env["PYTHONPATH"], "mlx_lm", "quant", "utils.py").write_text(
        "from pathlib import Path\n"
        "def load_data(tokenizer, num_samples, sequence_length):\n"
        "    return Path.home() / '.cache/mlx-lm/calibration_v6.txt'\n"
    )
    done = run(*ASK, env=env)
    assert done.returncode == 2
    assert (
        "error: mlx-lm 0.99.0 is untested and differs where weights needs it (mlx_lm.quant.utils:"
        "'.cache/mlx-lm/calibration_v5.txt' is missing: " in done.stderr
    )


def test_a_tested_release_that_somebody_edited_is_refused_too(run, fake_mlx_lm):
    env = fake_mlx_lm("0.32.2")
    utils = Path(env["PYTHONPATH"], "mlx_lm", "utils.py")
    utils.write_text(utils.read_text().replace("hf_repo_to_path", "path_of_repo"))
    done = run(*ASK, env=env)
    assert done.returncode == 2
    assert (
        "error: mlx-lm 0.32.2 is not what was released under that number where weights needs it "
        "(mlx_lm.utils:hf_repo_to_path is missing: " in done.stderr
    )
    assert done.stderr.endswith("install it anew\n")
    code = "import mlx_optiq_ext; print(mlx_optiq_ext.status(verbose=True))"
    text = run("python", "-c", code, env=env, check=True).stdout
    assert "\n  weights: off (mlx-lm 0.32.2 is not what was released under that number" in text


def test_the_installed_release_under_an_unknown_number_has_every_feature_on(
    claim, command, fresh_gate, tiny
):
    known = mlx_optiq_hooks.gate()
    carried = [feature for feature in FEATURES if known.state(feature).on]
    mlx_optiq_hooks.gate.cache_clear()
    claim("0.99.0")
    assert mlx_optiq_hooks.gate().verdict == "untested"
    for feature in carried:
        assert mlx_optiq_hooks.gate().state(feature).on, feature
    assert "untested" in mlx_optiq_hooks.gate().state("weights").reason
    # Past the gate, to the library's own refusal of the budget.
    outcome = command("convert", "--hf-path", tiny, "--optiq-budget", "1")
    assert outcome.status == 2
    assert "untested" not in outcome.err


def test_a_flag_is_refused_when_the_installed_release_claims_an_old_number(
    claim, command, fresh_gate
):
    claim("0.29.1")
    outcome = command("convert", "--hf-path", "no/such-model", "--optiq-budget", "4")
    assert outcome.status == 2
    assert "mlx-lm 0.29.1 is older than" in outcome.err


def judged():
    return Gate.for_installed(mlx_optiq_hooks.tables(), mlx_optiq_hooks.patch_engine)


@pytest.mark.parametrize(
    ("version", "mlx"),
    [
        ("0.30.4", "0.30.3"),
        *((version, "0.32.4") for version in ("0.32.2", "0.29.1", "0.99.0", "who knows", None)),
    ],
)
def test_every_feature_has_a_state_and_a_reason(claim, version, mlx):
    claim(version, mlx)
    gate = judged()
    assert tuple(gate.states) == FEATURES
    assert all(state.reason for state in gate.states.values())
    on = version in ("0.30.4", "0.32.2", "0.99.0")
    assert gate.state("weights").on is on
    if not on:
        with pytest.raises(UnsupportedError, match="mlx-lm"):
            gate.require("weights")


def test_without_mlx_lm_the_reason_says_how_to_get_it(claim):
    claim(None)
    gate = judged()
    assert gate.reason == "mlx-lm is not installed: pip install mlx-lm"
