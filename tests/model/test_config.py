"""Which part of a config.json is the text model's, on small and on published ones."""

import json
from pathlib import Path

import pytest

from mlx_optiq_ext.model import config

SMALL = sorted((Path(__file__).resolve().parents[1] / "data" / "configs_small").glob("*.json"))


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_a_small_config_says_how_many_layers_its_text_model_has(path):
    found = json.loads(path.read_text())
    nested = found.get("text_config", found)
    assert config.layer_count(found) == nested["num_hidden_layers"]
    assert config.text_config(found)["model_type"]
    assert config.text_config(found)["hidden_size"] == nested["hidden_size"]


@pytest.mark.shared
def test_every_published_config_says_how_many_layers_its_text_model_has(shared):
    unknown, nested = [], []
    for path in sorted((shared / "data" / "configs").glob("*_config.json")):
        found = json.loads(path.read_text())
        if "model_type" not in found:
            continue  # how a checkpoint is quantized, beside its config
        text = config.text_config(found)
        nested += [path.name] if text != found else []
        if not (config.layer_count(found) or 0) > 1 or "hidden_size" not in text:
            unknown.append(path.name)
    assert unknown == []
    assert len(nested) > 20


@pytest.mark.parametrize("key", ["text_config", "llm_config", "language_config"])
def test_a_nested_part_has_the_wrappers_model_type_unless_it_names_its_own(key):
    found = {"model_type": "outer", "num_hidden_layers": 9, key: {"n_layer": 3}}
    assert config.text_config(found) == {"model_type": "outer", "n_layer": 3}
    assert config.layer_count(found) == 3
    found[key]["model_type"] = "inner"
    assert config.text_config(found)["model_type"] == "inner"


@pytest.mark.parametrize(
    ("found", "count"),
    [
        ({}, None),
        ({"text_config": {}, "num_hidden_layers": 4}, 4),
        ({"num_hidden_layers": True}, None),
        ({"num_hidden_layers": None, "layers_block_type": ["mamba", "moe"]}, 2),
        ({"hybrid_override_pattern": "M-M*"}, 4),
    ],
)
def test_layers_are_counted_where_they_are_named(found, count):
    assert config.layer_count(found) == count


def test_a_dtype_is_looked_for_where_convert_does():
    assert config.convert_dtype({"torch_dtype": "float16", "dtype": "float32"}) == "float16"
    assert config.convert_dtype({"text_config": {"dtype": "bfloat16"}}) == "bfloat16"
    assert config.convert_dtype({"dtype": "bfloat16"}) is None  # as mlx_lm.convert


def test_the_wrappers_word_on_tied_embeddings_comes_first():
    name = "tie_word_embeddings"
    assert config.ties_embeddings({name: True})
    assert config.ties_embeddings({"text_config": {name: True}})
    assert not config.ties_embeddings({name: False, "text_config": {name: True}})
    assert not config.ties_embeddings({})


@pytest.mark.parametrize(
    ("name", "tower", "generates"),
    [
        ("model.layers.0.mlp.up_proj.weight", False, True),
        ("vision_tower.blocks.0.weight", True, False),
        ("model.visual.merger.weight", True, False),
        ("model.mm_projector.weight", True, False),
        ("model.vision_adapter.mlp.weight", True, False),
        ("model.vision_embed_tokens.weight", True, False),
        ("mtp.layers.0.weight", False, False),
        ("model.mtp_layers.0.weight", False, False),
        ("model.layers.0.visualized.weight", False, True),
    ],
)
def test_towers_and_drafting_layers_do_not_generate_text(name, tower, generates):
    assert config.in_tower(name) == tower
    assert config.generates(name) == generates


def test_embeddings_are_known_by_their_last_name():
    assert config.is_embedding("model.embed_tokens")
    assert config.is_embedding("transformer.wte")
    assert not config.is_embedding("model.embed_tokens_per_layer")
    assert not config.is_embedding("model.embed_tokens.inner")
