"""Single properties of the text model, and what is refused."""

import copy
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm.utils import load_model, quantize_model, save, save_model

from mlx_optiq_ext import modalities
from mlx_optiq_ext.errors import InputError, UnsupportedError

from .checkpoints import DATA, KINDS, MUSE_SPARK, TOKENS, tensors, write
from .conftest import load, names

KIND = {kind.name: kind for kind in KINDS}


def test_a_text_model_is_left_alone(tiny):
    model, _, config = load(tiny)
    assert modalities.to_text(model, config) is None


@pytest.mark.parametrize("name", ["vision_config", "audio_config"])
def test_an_unknown_multimodal_model_is_refused_with_the_remedy(tiny, name):
    model, _, config = load(tiny)
    config |= {"model_type": "hologram", name: {"depth": 3}}
    with pytest.raises(UnsupportedError, match=r"hologram.*--optiq-keep-unused-modalities"):
        modalities.to_text(model, config)


def test_a_checkpoint_with_a_class_of_its_own_is_refused(published):
    model, _, config = load(published(KIND["gemma3"]))
    with pytest.raises(UnsupportedError, match="gemma3"):
        modalities.to_text(model, config | {"model_file": "model.py"})


def test_an_mlx_lm_without_the_text_class_is_refused(published, monkeypatch):
    model, _, config = load(published(KIND["gemma3"]))
    monkeypatch.setitem(sys.modules, "mlx_lm.models.gemma3_text", None)
    with pytest.raises(UnsupportedError, match="no model gemma3_text"):
        modalities.to_text(model, config)


def test_a_wrapper_that_builds_another_text_class_is_refused(published):
    model, _, config = load(published(KIND["mistral3"]))
    config["text_config"]["model_type"] = "ministral3"
    with pytest.raises(UnsupportedError, match=r"mlx_lm\.models\.llama"):
        modalities.to_text(model, config)


def test_a_wrapper_with_a_tensor_beside_its_text_model_is_refused(published):
    model, _, config = load(published(KIND["gemma3"]))
    model.something = nn.Linear(4, 4)
    with pytest.raises(UnsupportedError, match=r"something\.weight"):
        modalities.to_text(model, config)


def test_model_and_config_given_are_not_changed(published):
    model, _, config = load(published(KIND["gemma4_e4b"]))
    before, tensors = copy.deepcopy(config), names(model)
    text = modalities.to_text(model, config)
    assert text is not None
    assert config == before
    assert names(model) == tensors
    assert text.config is not config


def test_tensors_are_handed_over_without_a_copy(published):
    model, _, config = load(published(KIND["gemma4_e4b"]))
    text = modalities.to_text(model, config)
    assert text is not None
    mine, theirs = tensors(text.model), tensors(model)
    assert mine
    assert all(value is theirs[f"language_model.{name}"] for name, value in mine.items())


def test_shared_layers_have_no_keys_and_values_of_their_own(published):
    pytest.importorskip("mlx_lm.models.gemma4_text")
    source = published(KIND["gemma4_e4b"])
    model, _, config = load(source)
    text = modalities.to_text(model, config)
    assert text is not None
    module = import_module("mlx_lm.models.gemma4_text")
    expected = names(module.Model(module.ModelArgs.from_dict(copy.deepcopy(text.config))))
    assert names(text.model) == expected
    stored = mx.load(str(source / "model.safetensors"))
    assert isinstance(stored, dict)
    for layer in (4, 5):  # the last two of six share
        name = f"model.layers.{layer}.self_attn.k_proj.weight"
        assert name.replace("model.", "model.language_model.", 1) in stored
        assert (name in names(text.model)) == (name in expected)


def test_predicates_of_routers_and_norms_come_along(published):
    model, _, config = load(published(KIND["gemma4_moe"]))
    text = modalities.to_text(model, config)
    assert text is not None
    router: Any = text.model
    assert router.quant_predicate("model.layers.0.router.proj", None) == {
        "group_size": 64,
        "bits": 8,
    }
    model, _, config = load(published(KIND["qwen3_5_moe"]))
    text = modalities.to_text(model, config)
    assert text is not None
    recurrent: Any = text.model
    assert not recurrent.cast_predicate("layers.0.linear_attn.A_log")


def test_keys_of_the_wrapper_win_only_where_the_text_model_does_not_read_them(published):
    model, _, config = load(published(KIND["gemma4_e4b"]))
    config |= {"eos_token_id": [0, 2], "pad_token_id": 77, "tie_word_embeddings": False}
    text = modalities.to_text(model, config)
    assert text is not None
    assert text.config["eos_token_id"] == [0, 2]
    assert text.config["pad_token_id"] == 0
    assert text.config["tie_word_embeddings"] is True


def test_defaults_of_the_wrapper_are_written_down(published):
    model, _, config = load(published(KIND["gemma3"]))
    text = modalities.to_text(model, config)
    assert text is not None
    # Gemma-3's text_config leaves these out, and the two classes disagree about them.
    assert (text.config["num_attention_heads"], text.config["num_key_value_heads"]) == (8, 4)
    assert text.config["vocab_size"] == 1024


@pytest.mark.parametrize("name", ["gemma4_moe", "qwen3_vl", "qwen3_5"])
def test_a_quantized_model_keeps_its_packed_tensors(name, published, tmp_path):
    source = published(KIND[name])
    model, tokenizer, config = load(source)

    def predicate(path, module):
        bits = 8 if "embed" in path or "router" in path else 4
        return module.weight.shape[-1] % 32 == 0 and {"group_size": 32, "bits": bits}

    model, config = quantize_model(model, config, 32, 4, quant_predicate=predicate)
    text = modalities.to_text(model, config)
    assert text is not None
    save(tmp_path / "out", source, text.model, tokenizer, dict(text.config), donate_model=False)
    again = mlx_lm.load(str(tmp_path / "out"))[0]
    assert mx.array_equal(again(TOKENS), model(TOKENS)).item()


def test_the_vision_tower_that_mlx_lm_loads_is_dropped(tmp_path):
    folder = write(MUSE_SPARK, tmp_path / "muse")
    model, config = load_model(folder, lazy=True)
    assert any("vision_tower" in name for name in names(model))
    text = modalities.to_text(model, config, folder)
    assert text is not None
    assert not any(modalities.in_tower(name) for name in names(text.model))
    assert text.report.bytes > 0
    save_model(tmp_path / "out", text.model)
    (tmp_path / "out" / "config.json").write_text(json.dumps(text.config))
    again, _ = load_model(tmp_path / "out")
    # Its rotary kernel runs on Metal only, so tensors are compared instead of logits.
    kept = tensors(model)
    for name, value in tensors(again).items():
        assert mx.array_equal(value, kept[name]).item(), name
    assert names(again) == {name for name in kept if not modalities.in_tower(name)}


def test_what_the_class_demands_is_handed_down(published):
    config = KIND["qwen3_vl_moe"].config()
    assert modalities.handed_down(config)["text_config"]["tie_word_embeddings"] is False
    assert modalities.handed_down(KIND["qwen3_vl"].config()) == {}
    assert modalities.handed_down(KIND["gemma3"].config()) == {}
    assert modalities.handed_down({"model_type": "qwen3"}) == {}


def test_the_report_names_what_is_gone(published):
    source = published(KIND["gemma4_e4b"])
    model, _, config = load(source)
    text = modalities.to_text(model, config, source)
    assert text is not None
    assert len(text.report.tensors) == 4
    assert text.report.bytes == 4 * 8 * 16 * 4
    assert "as gemma4_text: left out 4 vision and audio tensors" in text.report.summary()
    entry = text.report.entry()
    assert entry["op"] == "strip_multimodal_metadata"
    assert entry["architectures"]["to"] == ["Gemma4ForCausalLM"]
    assert "audio_config" in entry["dropped_keys"]
    json.dumps(entry)


def test_a_cut_off_checkpoint_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x00\x01")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        modalities.tower_tensors(tmp_path)


def test_the_tokenizer_forgets_its_processor(tmp_path):
    path = tmp_path / "tokenizer_config.json"
    mapped = {"AutoProcessor": "processing.P", "AutoTokenizer": ["tokenization.T", None]}
    path.write_text(json.dumps({"processor_class": "P", "auto_map": mapped, "eos_token": "</s>"}))
    for name in ("image_processing_x.py", "tokenization_x.py", "chat_template.jinja"):
        (tmp_path / name).touch()
    assert modalities.remove_processor_files(tmp_path) == ("image_processing_x.py",)
    left = json.loads(path.read_text())
    assert left == {"auto_map": {"AutoTokenizer": ["tokenization.T", None]}, "eos_token": "</s>"}
    assert (tmp_path / "tokenization_x.py").exists()


@pytest.mark.parametrize(
    "kind",
    [KIND["gemma4_e4b"], KIND["qwen3_vl"], KIND["qwen3_5_moe"]],
    ids=lambda kind: kind.name,
    scope="session",
)
def test_the_stock_command_generates_from_it_without_us(kind, converted, run):
    command = ("python", "-m", "mlx_lm", "generate", "--model", converted.folder)
    options = ("--prompt", "12 apples", "--max-tokens", "3")
    done = run(*command, *options, env={"MLX_OPTIQ_EXT": "0"}, check=True)
    assert "Generation: " in done.stdout


@pytest.mark.parametrize("family", modalities.FAMILIES, ids=lambda f: f"{f.wrapper}-{f.text}")
def test_the_table_agrees_with_mlx_lm(family):
    """Each wrapper that this mlx-lm has names the text module that the table gives."""
    remapping = mlx_lm.utils.MODEL_REMAPPING
    folder = Path(str(mlx_lm.__file__)).parent / "models"
    wrapper = folder / f"{remapping.get(family.wrapper, family.wrapper)}.py"
    text = remapping.get(family.text, family.text)
    if not wrapper.exists():
        pytest.skip("not in this mlx-lm")
    source = wrapper.read_text()
    assert family.unwraps == (wrapper.stem != text)
    if family.unwraps and (folder / f"{text}.py").exists():
        assert str(text) in source


@pytest.mark.shared
def test_small_configs_have_the_keys_of_the_real_ones(shared):
    real = {
        "gemma4_e4b": "google--gemma-4-E4B-it",
        "gemma4_moe": "google--gemma-4-26B-A4B",
        "qwen3_5": "Qwen--Qwen3.5-27B",
        "qwen3_5_moe": "Qwen--Qwen3.5-35B-A3B",
        "qwen3_vl": "Qwen--Qwen3-VL-2B-Instruct",
        "qwen3_vl_moe": "Qwen--Qwen3-VL-30B-A3B-Instruct",
        "llama4": "meta-llama--Llama-4-Scout-17B-16E-Instruct",
        "kimi_k25": "moonshotai--Kimi-K2.5",
    }
    for name, repository in real.items():
        path = shared / "data" / "configs" / f"{repository}_config.json"
        published = json.loads(path.read_text())
        small = json.loads((DATA / "configs_small" / f"{name}.json").read_text())
        assert published.keys() <= small.keys() | {"quantization_config"}
        inner = small["text_config"].keys() | {"vocab_size"}
        assert published["text_config"].keys() - {"quantization_config"} <= inner


@pytest.mark.shared
def test_every_real_config_is_text_or_known(shared):
    for path in sorted((shared / "data" / "configs").glob("*_config.json")):
        config = json.loads(path.read_text())
        if "model_type" in config and modalities.is_multimodal(config):
            assert modalities.find(config) is not None, path.name
