"""Checkpoints in 8-bit floating point or in several dtypes, and configs that say too much."""

import json
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.utils import compute_bits_per_weight
from toy_fixtures import PLAIN
from toy_models import FAMILIES
from toy_qwen3 import TEXT, write_toy

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.files import write_json
from mlx_optiq_ext.model.loading import load_unquantized, to_compute
from weights.published import FP8, wrap, write_fp8

PUBLISHED = [name for name in FP8 if name in FAMILIES]


@pytest.fixture
def words(tmp_path):
    """Options that take little time."""
    text = tmp_path / "calibration.txt"
    text.write_text(TEXT * 80)
    few = ("--optiq-bits", "4,8", "--optiq-group-sizes", "64", "--optiq-calibration", text)
    return (*few, *PLAIN)


def check(out, done):
    """A converted folder has the size that was printed, and works."""
    assert done.status == 0, done.err
    loaded: Any = mlx_lm.load(str(out), return_config=True)
    model, _, config = loaded
    (printed,) = [line for line in done.out.splitlines() if "of a budget of" in line]
    assert f"{compute_bits_per_weight(model):.3f} bits per weight" in printed
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"].get("mode", "affine") == "affine"
    assert mx.all(mx.isfinite(model(mx.array([[3, 1, 2]])))).item()
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_checkpoint_in_fp8_is_converted(command, tmp_path, words, name):
    source = write_fp8(name, tmp_path / name)
    mlx_lm.convert(str(source), str(tmp_path / "stock"), quantize=True)
    given = ("--hf-path", source, "--mlx-path", tmp_path / "out", "--optiq-budget", 6, *words)
    done = command("convert", *given)
    model = check(tmp_path / "out", done)
    assert ("as whole numbers" in done.out) == (name == "ministral3"), "mlx-lm reads it otherwise"
    plain = to_compute(load_unquantized(str(source))[0])
    tokens = mx.array([[3, 1, 2, 9]])
    error = mx.abs(model(tokens) - plain(tokens)).mean() / mx.abs(plain(tokens)).mean()
    assert float(error) < 0.5, "the plan was made for other weights than stock quantized"


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("minimax")])
def test_a_checkpoint_in_fp8_is_converted_layer_by_layer(
    command, tmp_path, words, monkeypatch, name
):
    source = write_fp8(name, tmp_path / name)
    given = ("--hf-path", source, "--optiq-budget", 6, *words)
    whole = command("convert", *given, "--mlx-path", tmp_path / "whole")
    monkeypatch.setenv("MLX_OPTIQ_EXT_STREAM", "1")
    done = command("convert", *given, "--mlx-path", tmp_path / "out")
    assert "reading the model layer by layer" in done.out
    check(tmp_path / "out", done)
    found = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("whole", "out"))
    assert next(found)["quantization"] == next(found)["quantization"], whole.err


@pytest.mark.newest  # mistral4 is as new as that
def test_the_text_model_of_a_checkpoint_in_fp8_is_converted(command, tmp_path, words):
    source = wrap(write_fp8("mistral4", tmp_path / "source"), "mistral3")
    given = ("--hf-path", source, "--mlx-path", tmp_path / "out", "--optiq-budget", 6, *words)
    done = command("convert", *given)
    check(tmp_path / "out", done)
    assert "Text only, as mistral4: left out 1 vision" in done.out


@pytest.mark.newest  # as minimax_m3_vl is
def test_a_dtype_is_taken_of_weights_that_mlx_lm_leaves_packed(command, tmp_path, words):
    source = write_fp8("minimax_m3_vl", tmp_path / "source")
    given = ("--hf-path", source, "--mlx-path", tmp_path / "out", "--optiq-budget", 6, *words)
    check(tmp_path / "out", command("convert", *given, "--dtype", "float16"))
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert isinstance(stored, dict)
    # Its cast_predicate keeps a router's corrections.
    other = {name for name, a in stored.items() if a.dtype not in (mx.float16, mx.uint32)}
    assert all(name.endswith("e_score_correction_bias") for name in other)


def test_refinement_meets_what_stock_loads_of_fp8(command, tmp_path, words):
    source = write_fp8("deepseek_v3", tmp_path / "source")
    given = ("--hf-path", source, "--mlx-path", tmp_path / "out", "--optiq-budget", 6, *words)
    check(tmp_path / "out", command("convert", *given, "--optiq-effort", "refine"))


@pytest.mark.parametrize(
    "stale",
    [
        {"quantization": {"group_size": 64, "bits": 4}},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        {"quantization": {"group_size": 32, "bits": 8, "mode": "mxfp8"}},
    ],
)
def test_what_a_config_says_of_quantization_does_not_count(command, tmp_path, words, stale):
    source = write_toy(tmp_path / "source", **stale)
    given = ("--hf-path", source, "--mlx-path", tmp_path / "out", "--optiq-budget", 6, *words)
    check(tmp_path / "out", command("convert", *given))


def test_the_output_of_a_conversion_to_bfloat16_is_converted(command, tmp_path, words):
    source, plain = write_fp8("minimax", tmp_path / "source"), tmp_path / "plain"
    assert command("convert", "--hf-path", source, "--mlx-path", plain, "--dtype", "bfloat16")
    assert "quantization_config" in json.loads((plain / "config.json").read_text())
    given = ("--hf-path", plain, "--mlx-path", tmp_path / "out", "--optiq-budget", 6, *words)
    check(tmp_path / "out", command("convert", *given))


@pytest.mark.parametrize("effort", ["plan", "refine"])
def test_tensors_of_several_dtypes_keep_them(command, tmp_path, words, effort):
    source = write_toy(tmp_path / "source")
    path, settings = source / "model.safetensors", json.loads((source / "config.json").read_text())
    write_json(source / "config.json", {k: v for k, v in settings.items() if "dtype" not in k})
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    wide = {"down_proj": mx.float32, "gate_proj": mx.float16, "q_norm": mx.float32}
    for name, array in arrays.items():
        kind = next((dtype for part, dtype in wide.items() if part in name), mx.bfloat16)
        arrays[name] = array.astype(kind)
    mx.eval(arrays)
    mx.save_safetensors(str(path), arrays, metadata={"format": "mlx"})
    given = ("--hf-path", source, "--mlx-path", tmp_path / "out", "--optiq-budget", 6, *words)
    check(tmp_path / "out", command("convert", *given, "--optiq-effort", effort))
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert isinstance(stored, dict)
    assert stored["model.layers.0.mlp.down_proj.scales"].dtype == mx.float32
    assert stored["model.layers.0.mlp.gate_proj.scales"].dtype == mx.float16
    assert stored["model.layers.0.self_attn.q_proj.scales"].dtype == mx.bfloat16


def test_other_quantized_weights_are_refused_by_what_they_are(tmp_path):
    source, quantized = write_toy(tmp_path / "source"), tmp_path / "quantized"
    mlx_lm.convert(str(source), str(quantized), quantize=True, q_mode="mxfp4", q_group_size=32)
    with pytest.raises(InputError, match=r"quantized is quantized already: convert from its"):
        load_unquantized(str(quantized))
