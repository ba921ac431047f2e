"""Loading as text from a folder, without any patch."""

import mlx_lm
import pytest

from mlx_optiq_ext import modalities

from .checkpoints import KINDS, TOKENS, text_class

KIND = {kind.name: kind for kind in KINDS}


def test_a_checkpoint_is_loaded_as_text_with_mlx_lms_load(published):
    kind = KIND["gemma3"]
    loaded = modalities.load_text(mlx_lm.load, str(published(kind)), lazy=True)
    assert type(loaded.model) is text_class(kind)
    assert loaded.config["model_type"] == "gemma3_text"
    assert loaded.report is not None
    assert loaded.report.tensors
    assert loaded.model(TOKENS).shape == (1, TOKENS.size, 1024)


def test_what_the_class_demands_is_handed_down_on_the_way(published):
    loaded = modalities.load_text(mlx_lm.load, str(published(KIND["qwen3_vl_moe"])))
    assert loaded.config["model_type"] == "qwen3_moe"


def test_a_text_model_is_loaded_as_ever(tiny):
    loaded = modalities.load_text(mlx_lm.load, str(tiny))
    assert loaded.report is None
    assert loaded.config["model_type"] == "qwen3"


def test_a_folder_without_a_config_fails_with_mlx_lms_own_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        modalities.load_text(mlx_lm.load, str(tmp_path))
