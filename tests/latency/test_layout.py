"""Bytes of a token by config and headers, against what mlx-lm really builds."""

import json
import struct
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, save_model
from toy_qwen3 import moe, toy_config

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.kv import KVPlan, LayerFormat, parse_spec
from mlx_optiq_ext.latency import (
    Header,
    Workload,
    demand,
    find_chip,
    layout_of,
    predict,
    read_layout,
)
from mlx_optiq_ext.latency.caches import layer_caches
from mlx_optiq_ext.latency.roofline import read_bytes

from .published import layout_named


def save(folder: Path, model, config) -> Path:
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folders_bytes_are_those_of_its_arrays(tiny):
    model, _ = load_model(tiny)
    arrays: list = tree_flatten(model.parameters())  # pyright: ignore
    layout = read_layout(str(tiny))
    assert layout.nbytes == sum(array.nbytes for _, array in arrays)
    caches = make_prompt_cache(model)
    model(mx.array([[1, 2, 3, 4]]), cache=caches)
    assert len(layout.caches) == len(caches)
    for own, cache in zip(layout.caches, caches, strict=True):
        kept = cache.keys[..., :4, :].nbytes + cache.values[..., :4, :].nbytes
        assert own.nbytes(4, None, layout.element_bytes) == kept


def test_a_packed_models_bytes_and_weights(tiny, tmp_path):
    model, config = load_model(tiny)
    count = sum(v.size for _, v in tree_flatten(model.parameters()))  # pyright: ignore
    nn.quantize(model, group_size=32, bits=3)
    config["quantization"] = {"bits": 3, "group_size": 32}
    layout = read_layout(str(save(tmp_path, model, config)))
    assert sum(o.elements for o in layout.operators) == count
    arrays: list = tree_flatten(model.parameters())  # pyright: ignore
    assert layout.nbytes == sum(array.nbytes for _, array in arrays)


def test_a_token_reads_the_experts_it_is_routed_to(tmp_path):
    model = moe()
    config = toy_config(model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2)
    layout = read_layout(str(save(tmp_path, model, config)))
    experts = [o for o in layout.operators if o.kind == "expert"]
    assert len(experts) == 6
    assert layout.expert_layers == 2
    assert {o.experts for o in experts} == {4}
    for operator in experts:
        assert read_bytes(operator, layout) == operator.nbytes / 2
        # Two draws of two in four: three quarters are hit on average.
        assert read_bytes(operator, layout, batch=2) == operator.nbytes * 3 / 4


def test_experts_stored_one_by_one_are_one_operator():
    headers = {
        f"model.layers.0.mlp.experts.{n}.up_proj.weight": Header("BF16", (8, 4), 64)
        for n in range(6)
    }
    layout = layout_of({"num_experts_per_tok": 3}, headers)
    (operator,) = layout.operators
    assert (operator.kind, operator.experts, operator.nbytes) == ("expert", 6, 384)
    assert read_bytes(operator, layout) == 192


KINDS = {
    "llama-3.1-8b": {"full": 32},
    "qwen3.5-27b": {"recurrent": 48, "full": 16},
    "gemma3-27b": {"sliding": 52, "full": 10},
    "gpt-oss-20b": {"sliding": 12, "full": 12},
    "deepseek-v2-lite": {"latent": 27},
    "gemma4-e4b": {"sliding": 20, "full": 4, "shared": 18},
    "nemotron-3-nano-30b-a3b": {"recurrent": 23, "full": 6},
}


@pytest.mark.parametrize("name", KINDS)
def test_the_kind_of_each_layers_cache(name):
    found: dict[str, int] = {}
    for cache in layout_named(name, "4g64").caches:
        found[cache.kind] = found.get(cache.kind, 0) + 1
    assert found == KINDS[name]


def test_a_window_a_latent_and_a_state_stop_growing():
    cache = {c.kind: c for c in layout_named("gemma3-27b", "4g64").caches}
    assert cache["sliding"].nbytes(10_000, None, 2) == cache["sliding"].nbytes(20_000, None, 2)
    assert cache["full"].nbytes(20_000, None, 2) == 2 * cache["full"].nbytes(10_000, None, 2)
    latent = layout_named("deepseek-v2-lite", "4g64").caches[0]
    assert latent.nbytes(100, None, 2) == 100 * (512 + 64) * 2
    state = layout_named("qwen3.5-27b", "4g64").caches[0]
    assert state.nbytes(10, None, 2) == state.nbytes(10_000, None, 2) == 2 * 4 * 48 * 128 * 128


def test_gemma4s_full_layers_have_their_own_heads():
    caches = layout_named("gemma4-31b", "4g64").caches
    assert {(c.kind, c.key_width) for c in caches} == {("sliding", 16 * 256), ("full", 4 * 512)}


def test_a_kv_plan_shrinks_what_is_read(tiny):
    layout = read_layout(str(tiny))
    plan = parse_spec("k8v4")
    plain, packed = demand(layout, 4096), demand(layout, 4096, kv_plan=plan)
    assert packed.cache_bytes == pytest.approx(plain.cache_bytes * (8.5 + 4.5) / 32)
    wrong = KVPlan("other.json", {9: LayerFormat(None, None)})
    with pytest.raises(InputError, match="layer_idx 9"):
        predict(layout, find_chip("h100"), Workload(), kv_plan=wrong)


def test_an_adapter_is_read_too(tiny, tmp_path):
    low = {"lora_a": mx.zeros((128, 8)), "lora_b": mx.zeros((8, 128))}
    path = "model.layers.0.self_attn.q_proj"
    mx.save_safetensors(
        str(tmp_path / "adapters.safetensors"), {f"{path}.{k}": v for k, v in low.items()}
    )
    bare, adapted = read_layout(str(tiny)), read_layout(str(tiny), adapter=str(tmp_path))
    assert adapted.nbytes == bare.nbytes + 2 * 8 * 128 * 4
    assert demand(adapted, 1).launches == demand(bare, 1).launches + 3


def test_a_batch_shares_weights_and_not_caches(tiny):
    layout, chip = read_layout(str(tiny)), find_chip("m4-max-40")
    one, four = demand(layout, 512), demand(layout, 512, batch=4)
    assert four.cache_bytes == 4 * one.cache_bytes
    assert four.seconds(chip)["weights"] == pytest.approx(one.seconds(chip)["weights"], rel=0.01)
    with pytest.raises(InputError, match="1 or more"):
        Workload(batch=0)


def header_file(path: Path, body: bytes, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(body) if length is None else length) + body)


@pytest.mark.parametrize(
    "broken", [b"{", b"[]", b'{"a": {"dtype": "F32"}}', b'{"a": {"dtype": "F32", "shape": [2]}}']
)
def test_a_file_without_a_header_is_refused_by_name(tmp_path, broken):
    (tmp_path / "config.json").write_text("{}")
    header_file(tmp_path / "model.safetensors", broken)
    with pytest.raises(InputError, match=r"model\.safetensors.*: (give a|is the download)"):
        read_layout(str(tmp_path))


def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    header_file(tmp_path / "model.safetensors", b"{}", length=1 << 62)
    with pytest.raises(InputError, match="no safetensors header"):
        read_layout(str(tmp_path))


def test_a_folder_without_weights_or_config_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        read_layout(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no safetensors weights"):
        read_layout(str(tmp_path))
    with pytest.raises(InputError, match="give a folder or a Hub repository"):
        read_layout("./nowhere")


def test_layers_without_tensors_have_no_cache():
    assert layer_caches({"num_hidden_layers": 2, "num_attention_heads": 2}, {0: {}, 1: {}}) == ()
