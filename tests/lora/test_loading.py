"""Adapters of every form where stock mlx-lm reads ``adapter_path``."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest

from mlx_optiq_ext import OptiqError
from mlx_optiq_ext.lora import readable_by_stock
from mlx_optiq_ext.lora.residual import dequantized
from tests.kv.conftest import serve

from .conftest import PATH, load_tensors, logits
from .test_reading import DAMAGE, PEFT_DAMAGE, edit

Q, V = PATH.format(0, "q"), PATH.format(1, "v")
NAMES = ("mixed", "rslora", "dora")


@pytest.fixture
def in_float32(tiny, tmp_path):
    """The tiny model on disk in float32."""
    from mlx_lm.utils import save_model

    model: Any = mlx_lm.load(str(tiny))[0]
    model.set_dtype(mx.float32)
    folder = tmp_path / "in-float32"
    save_model(folder, model)
    for path in tiny.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_peft_adapter_loads_and_computes_what_peft_did(in_float32, recorded, tokens, name):
    model = mlx_lm.load(str(in_float32), adapter_path=str(recorded / name))[0]
    expected = np.load(recorded / name / "logits.npy")
    assert np.abs(np.array(logits(model, tokens)) - expected).max() < 1e-3


def test_ranks_of_their_own_load(in_float32, stored, tokens):
    mixed = mlx_lm.load(str(in_float32), adapter_path=str(stored({Q: 2, V: 5})))[0]
    ranks = {path: m.lora_a.shape[1] for path, m in mixed.named_modules() if "lora_a" in m}
    assert ranks == {Q: 2, V: 5}
    plain = mlx_lm.load(str(in_float32))[0]
    assert mx.abs(logits(mixed, tokens) - logits(plain, tokens)).max() > 1e-3


def test_one_rank_for_all_is_left_to_stock(in_float32, stored, monkeypatch):
    utils = importlib.import_module("mlx_lm.tuner.utils")
    asked = []
    lora = importlib.import_module("mlx_optiq_ext.lora")
    monkeypatch.setattr(lora, "read_adapter", lambda source: asked.append(source))
    folder = stored({PATH.format(n, "q"): 3 for n in range(6)})
    assert readable_by_stock(folder)
    mlx_lm.load(str(in_float32), adapter_path=str(folder))
    assert not asked
    assert readable_by_stock("nowhere")
    with pytest.raises(FileNotFoundError):
        utils.load_adapters(nn.Module(), "nowhere")


NOT_STOCK = ("scale of NaN", "scale of infinity", "huge scale", "whole numbers", "not JSON")


@pytest.mark.parametrize("name", [*NOT_STOCK, "complex numbers", "DoRA without lengths"])
def test_numbers_that_stock_would_take_are_refused(in_float32, stored, name):
    folder = stored({PATH.format(n, "q"): 2 for n in range(6)})
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(OptiqError, match=message):
        mlx_lm.load(str(in_float32), adapter_path=str(folder))


@pytest.mark.parametrize("stem", ["language_model.", "model.language_model."])
def test_an_adapter_of_a_wrapped_model_loads_and_fuses_once_both_forms_are_there(
    run, in_float32, recorded, tokens, tmp_path, stem
):
    folder = shutil.copytree(recorded / "rslora", tmp_path / "copy")
    path = folder / "adapter_model.safetensors"
    inner = "base_model.model.model."
    wrapped = f"base_model.model.{stem}" + ("model." if stem.startswith("language") else "")
    tensors = load_tensors(path)
    assert all(name.startswith(inner) for name in tensors)
    mx.save_safetensors(
        str(path), {name.replace(inner, wrapped, 1): tensor for name, tensor in tensors.items()}
    )
    run("mlx_lm.lora", "--optiq-export-peft", folder, check=True)
    assert any("language_model.model." in n for n in load_tensors(folder / "adapters.safetensors"))
    expected = np.load(recorded / "rslora" / "logits.npy")
    model = mlx_lm.load(str(in_float32), adapter_path=str(folder))[0]
    assert np.abs(np.array(logits(model, tokens)) - expected).max() < 1e-3
    out = tmp_path / "fused"
    words = ("mlx_lm.fuse", "--model", in_float32, "--adapter-path", folder, "--save-path", out)
    run(*words, check=True)
    fused = mlx_lm.load(str(out))[0]
    assert np.abs(np.array(logits(fused, tokens)) - expected).max() < 1e-2


@pytest.mark.parametrize("name", [n for n in DAMAGE if n not in ("no config", "full fine-tune")])
def test_a_damaged_adapter_of_ours_is_one_error(in_float32, stored, name):
    folder = stored({Q: 2, V: 2}, notes={"ranks": {Q: 2, V: 2}})
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(OptiqError, match=message):
        mlx_lm.load(str(in_float32), adapter_path=str(folder))


@pytest.mark.parametrize("name", PEFT_DAMAGE)
def test_a_peft_adapter_beyond_mlx_lm_is_one_error(in_float32, recorded, tmp_path, name):
    folder = shutil.copytree(recorded / "mixed", tmp_path / "copy")
    changes, message = PEFT_DAMAGE[name]
    edit(folder, **changes)
    with pytest.raises(OptiqError, match=message):
        mlx_lm.load(str(in_float32), adapter_path=str(folder))


def test_generate_takes_one_and_says_what_is_wrong_with_another(run, tiny, recorded, tmp_path):
    question = "There are 13 bricks in each bag and Noah buys 2 bags. How many bricks are there?"
    words = ("mlx_lm.generate", "--model", tiny, "--prompt", question, "--max-tokens", "24")
    quiet = ("--verbose", "False", "--temp", "0")
    plain = run(*words, *quiet, check=True).stdout
    adapted = run(*words, *quiet, "--adapter-path", recorded / "ours", check=True).stdout
    assert adapted != plain
    folder = shutil.copytree(recorded / "mixed", tmp_path / "copy")
    edit(folder, r=5)
    done = run(*words, "--adapter-path", folder)
    assert done.returncode == 2
    assert "mlx_lm.generate: error:" in done.stderr
    assert "Traceback" not in done.stderr


def test_lora_test_evaluates_a_peft_adapter(run, tiny, recorded, data):
    words = ("mlx_lm.lora", "--model", tiny, "--data", data, "--test", "--test-batches", "1")
    short = ("--batch-size", "2", "--max-seq-length", "48")
    done = run(*words, *short, "--adapter-path", recorded / "mixed", check=True)
    assert "Test loss" in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_fuse_keeps_each_layers_bits_and_group_size(run, packed, recorded, tmp_path, name):
    fused = tmp_path / "fused"
    words = ("--model", packed, "--adapter-path", recorded / name, "--save-path", fused)
    run("mlx_lm.fuse", *words, check=True)
    before, after = (json.loads((p / "config.json").read_text()) for p in (packed, fused))
    assert after["quantization"] == before["quantization"]
    found: Any = dict(mlx_lm.load(str(fused))[0].named_modules())
    adapted: Any = mlx_lm.load(str(packed), adapter_path=str(recorded / name))[0]
    fusible = [(path, m) for path, m in adapted.named_modules() if hasattr(m, "fuse")]
    assert len(fusible) >= 6
    for path, module in fusible:
        base, layer = module.linear, found[path]
        assert (layer.bits, layer.group_size) == (base.bits, 32)
        wanted = module.fuse(dequantize=True).weight
        # Within one step of its group.
        step = mx.repeat(mx.abs(layer.scales), 32, axis=-1)
        assert (mx.abs(dequantized(layer) - wanted) <= 1.01 * step).all()


def test_a_dequantized_fusion_is_exact(run, packed, recorded, tokens, tmp_path):
    fused = tmp_path / "fused"
    words = ("--model", packed, "--adapter-path", recorded / "mixed", "--save-path", fused)
    run("mlx_lm.fuse", *words, "--dequantize", check=True)
    adapted = mlx_lm.load(str(packed), adapter_path=str(recorded / "mixed"))[0]
    difference = logits(mlx_lm.load(str(fused))[0], tokens) - logits(adapted, tokens)
    assert mx.abs(difference).max() < 1e-3


FORGETFUL = mlx_lm.__version__.startswith("0.31")  # of the server's --adapter-path


@pytest.mark.skipif(FORGETFUL, reason="mlx-lm 0.31 forgets --adapter-path for its own model")
def test_a_damaged_peft_adapter_ends_the_server_at_start(tiny, recorded, tmp_path, run):
    folder = shutil.copytree(recorded / "mixed", tmp_path / "damaged")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:900])
    done = run("mlx_lm.server", "--model", tiny, "--adapter-path", folder, "--port", "0")
    assert done.returncode == 2
    assert "it is damaged or incomplete" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_server_serves_a_peft_adapter(tiny, recorded, tmp_path):
    question = "There are 13 bricks in each bag and Noah buys 2 bags. How many bricks?"
    with serve(tmp_path / "plain", "--model", tiny) as server:
        plain = server.ask(question)
    folder = recorded / "mixed"
    # A request may name it too.
    options = {"extra_body": {"adapters": str(folder)}} if FORGETFUL else {}
    with serve(tmp_path / "log", "--model", tiny, "--adapter-path", folder) as server:
        assert server.ask(question, **options) != plain


def test_a_name_on_the_hub_is_found_in_the_cache(in_float32, recorded, tokens, monkeypatch):
    import huggingface_hub

    def downloaded(name, *, revision, allow_patterns):
        assert name == "someone/an-adapter"
        assert "adapter_model.safetensors" in allow_patterns
        return str(recorded / "mixed")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", downloaded)
    model = mlx_lm.load(str(in_float32), adapter_path="someone/an-adapter")[0]
    expected = np.load(recorded / "mixed" / "logits.npy")
    assert np.abs(np.array(logits(model, tokens)) - expected).max() < 1e-3


def test_dora_of_three_bits_loads(packed, recorded, tokens):
    model = mlx_lm.load(str(packed), adapter_path=str(recorded / "dora"))[0]
    layer: Any = dict(model.named_modules())["model.layers.0.mlp.gate_proj"]
    assert layer.linear.bits == 3
    assert layer.lora_a.shape == (128, 2)
    assert mx.isfinite(logits(model, tokens)).all()


def test_what_is_stored_is_what_is_attached(in_float32, recorded):
    tensors = load_tensors(Path(recorded) / "mixed" / "adapter_model.safetensors")
    model = mlx_lm.load(str(in_float32), adapter_path=str(recorded / "mixed"))[0]
    layer: Any = dict(model.named_modules())[Q]
    stored = tensors[f"base_model.model.{Q}.lora_A.weight"]
    assert stored.dtype == mx.bfloat16
    assert mx.array_equal(layer.lora_a.T, stored.astype(mx.float32))
