"""Weights and configs that make numbers that are none."""

import json
import re

import mlx.core as mx
import pytest
from toy_fixtures import PLAIN
from toy_qwen3 import write_toy

#: Damage -> what the refusal names.
WEIGHTS = {
    "NaN": (float("nan"), r"model\.layers\.1\.mlp\.up_proj\.weight holds nan"),
    "infinity": (float("inf"), r"model\.layers\.1\.mlp\.up_proj\.weight holds inf"),
    "1e30": (1e30, r"model\.layers\.1\.mlp\.up_proj\.weight holds [\d.]+e\+(29|30)"),
}


def damaged(folder, value):
    model = write_toy(folder)
    path = model / "model.safetensors"
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    weight = arrays["model.layers.1.mlp.up_proj.weight"]
    weight[3, 5] = value
    mx.eval(arrays)
    mx.save_safetensors(str(path), arrays, metadata={"format": "mlx"})
    return model


@pytest.mark.parametrize("value", WEIGHTS)
def test_a_weight_that_is_no_number_is_named(command, text, tmp_path, value):
    written, named = WEIGHTS[value]
    model = damaged(tmp_path / "model", written)
    words = ("--hf-path", model, "--mlx-path", tmp_path / "out", "--optiq-calibration", text)
    done = command("convert", *words, *PLAIN, "--optiq-budget", 4)
    assert done.status == 2
    assert len(done.err.splitlines()[-1]) < 400
    assert re.search(named, done.err)
    assert not (tmp_path / "out").exists()


def test_a_config_that_makes_nan_is_named(command, text, tmp_path):
    model = write_toy(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": float("nan")}))
    words = ("--hf-path", model, "--mlx-path", tmp_path / "out", "--optiq-calibration", text)
    done = command("convert", *words, *PLAIN, "--optiq-budget", 4)
    assert done.status == 2
    assert "config.json" in done.err
    assert not (tmp_path / "out").exists()


def test_keys_and_values_of_a_damaged_model_are_not_planned(command, text, tmp_path):
    model = damaged(tmp_path / "model", float("nan"))
    words = ("--hf-path", model, "--mlx-path", tmp_path / "out", "--optiq-calibration", text)
    done = command("convert", *words, "--optiq-kv-budget", 5)
    assert done.status == 2
    assert "holds nan" in done.err
