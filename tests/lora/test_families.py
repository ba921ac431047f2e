"""Experts, embeddings and other layers: trained, saved, loaded by stock and by us."""

import json
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner import utils

from mlx_optiq_ext import OptiqError
from mlx_optiq_ext.lora import Request, attach, prepare, read_adapter, summary, table
from mlx_optiq_ext.lora.forms.peft_reading import PREFIX
from mlx_optiq_ext.lora.layers import adapted_layers
from mlx_optiq_ext.lora.residual import start_from_residual, top_factors
from tests.toy_models import build

TOKENS = mx.array([[5, 9, 2, 14, 7, 3]])


def quantized(model, *kinds):
    bits = dict(zip(kinds, (8, 4, 3, 6), strict=False))

    def predicate(path, module):
        kind = next((each for each in kinds if each in path), None)
        small = kind is None or not hasattr(module, "to_quantized")
        return False if small else {"bits": bits[kind], "group_size": 32}

    nn.quantize(model, class_predicate=predicate)
    return model


def trained(model, folder, *, keys, fine_tune_type="lora", **request) -> Any:
    """A model with LoRA layers, as if it had been trained, and its checkpoint."""
    model.freeze()
    config = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": keys}
    utils.linear_to_lora_layers(model, -1, config, use_dora=fine_tune_type == "dora")
    wanted = Request("toy", folder, scaling=request.pop("scaling", "by_bits"), **request)
    checkpoint = prepare(model, config, wanted)
    mx.random.seed(3)
    for layer in adapted_layers(model).values():
        layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.1
    folder.mkdir()
    stock = {
        "fine_tune_type": fine_tune_type,
        "num_layers": -1,
        "lora_parameters": {**config, "rank": checkpoint.widest},
    }
    checkpoint.write_config(stock)
    weights: Any = dict(tree_flatten(model.trainable_parameters()))
    checkpoint.write(folder / "adapters.safetensors", weights)
    return SimpleNamespace(checkpoint=checkpoint, logits=np.array(model(TOKENS)))


def moe() -> Any:
    return quantized(build("qwen3_moe"), "switch_mlp", "self_attn")


EXPERTS = [f"mlp.switch_mlp.{kind}_proj" for kind in ("gate", "up", "down")]


def test_experts_and_routers_get_ranks_of_their_own(tmp_path):
    keys = [*EXPERTS, "self_attn.q_proj", "mlp.gate"]
    done = trained(moe(), tmp_path / "a", keys=keys)
    ranks = done.checkpoint.ranks
    assert len(set(ranks.values())) > 1
    # Stock reads what we saved, with our loading out of the way; ours reads it too.
    stock: Any = moe()
    utils.load_adapters.__wrapped__(stock, str(tmp_path / "a"))  # pyright: ignore
    assert np.abs(np.array(stock(TOKENS)) - done.logits).max() < 1e-5
    adapter = read_adapter(tmp_path / "a")
    ours: Any = attach(moe(), adapter)
    assert np.abs(np.array(ours(TOKENS)) - done.logits).max() < 1e-5
    assert {path: layer.rank for path, layer in adapter.layers.items()} == ranks
    assert "switch_mlp" in table(adapter)


def test_experts_are_named_and_left_out_of_the_peft_form(tmp_path):
    done = trained(moe(), tmp_path / "a", keys=[*EXPERTS, "self_attn.q_proj"])
    stacked = [path for path in done.checkpoint.ranks if "switch_mlp" in path]
    assert stacked
    said = summary(done.checkpoint)
    assert all(path in said for path in stacked)
    tensors: Any = mx.load(str(tmp_path / "a" / "adapter_model.safetensors"))
    assert tensors
    assert not [name for name in tensors if "switch_mlp" in name]
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert not [name for name in config["target_modules"] if "switch_mlp" in name]


def test_only_experts_make_no_peft_form(tmp_path):
    trained(moe(), tmp_path / "a", keys=EXPERTS)
    assert not (tmp_path / "a" / "adapter_model.safetensors").exists()
    assert "peft_type" not in (tmp_path / "a" / "adapter_config.json").read_text()


def test_a_tied_embedding_is_a_head_for_peft(tmp_path):
    def tied() -> Any:
        model: Any = build("gemma")
        return quantized(model, "self_attn", "embed_tokens")

    model = tied()
    assert not any(path.endswith("lm_head") for path, _ in model.named_modules())
    keys = ["model.embed_tokens", "self_attn.v_proj"]
    done = trained(model, tmp_path / "a", keys=keys)
    ours: Any = attach(tied(), read_adapter(tmp_path / "a"))
    assert np.abs(np.array(ours(TOKENS)) - done.logits).max() < 1e-5
    tensors: Any = mx.load(str(tmp_path / "a" / "adapter_model.safetensors"))
    stem = f"{PREFIX}model.embed_tokens.lora_embedding_"
    assert mx.array_equal(tensors[f"{PREFIX}lm_head.lora_A.weight"], tensors[f"{stem}B"].T)
    # Read back from PEFT's form alone, it is one adapter for both again.
    (tmp_path / "a" / "adapters.safetensors").unlink()
    (tmp_path / "a" / "optiq_lora_config.json").unlink()
    again = read_adapter(tmp_path / "a")
    assert again.form == "peft"
    back: Any = attach(tied(), again)
    assert np.abs(np.array(back(TOKENS)) - done.logits).max() < 1e-5


def test_an_embedding_beside_a_head_of_its_own(tmp_path):
    def untied() -> Any:
        return quantized(build("mixtral"), "self_attn", "embed_tokens")

    keys = ["model.embed_tokens", "lm_head", "self_attn.v_proj"]
    done = trained(untied(), tmp_path / "a", keys=keys)
    for form in ("mlx-lm", "peft"):
        adapter = read_adapter(tmp_path / "a")
        assert adapter.form == form
        ours: Any = attach(untied(), adapter)
        assert np.abs(np.array(ours(TOKENS)) - done.logits).max() < 1e-5
        (tmp_path / "a" / "adapters.safetensors").unlink(missing_ok=True)


def test_dora_loads_in_stock_at_ranks_of_its_own(tmp_path):
    def model() -> Any:
        return quantized(build("qwen3_moe"), "q_proj", "v_proj")

    keys = ["self_attn.q_proj", "self_attn.v_proj"]
    done = trained(model(), tmp_path / "a", keys=keys, fine_tune_type="dora")
    stock: Any = model()
    utils.load_adapters.__wrapped__(stock, str(tmp_path / "a"))  # pyright: ignore
    assert np.abs(np.array(stock(TOKENS)) - done.logits).max() < 1e-5


def test_a_plugin_has_the_last_word_on_a_rank(tmp_path):
    model = moe()
    model.freeze()
    config = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    utils.linear_to_lora_layers(model, -1, config)

    def choose(path, module, rank):
        assert "scales" in module
        return 7 if "layers.1" in path else None

    ranks = prepare(model, config, Request("toy", tmp_path / "a"), choose).ranks
    assert {rank for path, rank in ranks.items() if "layers.1." in path} == {7}
    assert {rank for path, rank in ranks.items() if "layers.1." not in path} == {4}


@pytest.mark.parametrize("kind", [*EXPERTS[:1], "self_attn.q_proj", "model.embed_tokens"])
def test_residuals_of_every_kind_of_layer_shrink(kind):
    model = quantized(build("qwen3_moe"), "switch_mlp", "self_attn", "embed_tokens")
    original = build("qwen3_moe")
    weights = {p: m["weight"] for p, m in original.named_modules() if "weight" in m}
    config = {"rank": 6, "scale": 2.0, "dropout": 0.0, "keys": [kind]}
    utils.linear_to_lora_layers(model, -1, config)
    layers = adapted_layers(model)
    before = {path: weights[path] for path in layers}
    count = start_from_residual(model, layers, original, [[5, 9, 2, 14], [7, 3, 1]])
    assert count == len(layers) > 0
    for path, layer in layers.items():
        from mlx_optiq_ext.lora.residual import dequantized

        base = layer.get("linear", layer.get("embedding"))
        residual = before[path] - dequantized(base)
        fused = layer.fuse(dequantize=True).weight - dequantized(base)
        assert mx.linalg.norm(residual - fused) < mx.linalg.norm(residual)


def test_the_top_factors_are_the_best_of_their_rank():
    mx.random.seed(0)
    matrix = mx.random.normal((48, 80)) * mx.exp(-mx.arange(80) / 8)
    first, second = top_factors(matrix, 6)
    values = np.linalg.svd(np.array(matrix), compute_uv=False)
    best = np.sqrt((values[6:] ** 2).sum())
    assert np.linalg.norm(np.array(matrix - first @ second)) < 1.01 * best
    lengths = np.linalg.norm(np.array(first), axis=0), np.linalg.norm(np.array(second), axis=1)
    assert np.allclose(*lengths, rtol=1e-4)
    wide, more = top_factors(mx.random.normal((4, 9)), 6)
    assert (wide.shape, more.shape) == ((4, 6), (6, 9))


def test_a_sketch_weights_the_directions_by_the_inputs():
    mx.random.seed(1)
    matrix = mx.random.normal((32, 64))
    rows = mx.random.normal((500, 64)) * mx.where(mx.arange(64) == 3, 100.0, 0.1)
    sketch = rows.T @ mx.random.normal((500, 24))

    def error(factors):
        return mx.linalg.norm((matrix - factors[0] @ factors[1]) @ rows.T)

    assert error(top_factors(matrix, 2, sketch)) < 0.2 * error(top_factors(matrix, 2))


def test_a_model_with_lora_layers_of_its_own_is_refused(tmp_path):
    model: Any = build("afm7")
    model.freeze()
    config = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    utils.linear_to_lora_layers(model, -1, config)
    with pytest.raises(OptiqError, match="LoRA layers of its own"):
        prepare(model, config, Request("toy", tmp_path / "a"))
