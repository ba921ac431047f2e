"""Models that mlx-lm can split, as files."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
import toy_models
from live_server import write_exact
from mlx_lm.models import ministral3
from mlx_lm.utils import save_model

LAYERS = 6
VERSION = tuple(map(int, mlx_lm.__version__.split(".")[:3]))

needs_split_server = pytest.mark.skipif(
    VERSION < (0, 30, 6), reason="mlx-lm before 0.30.6 has no server on several ranks"
)


@pytest.fixture(scope="session")
def exact(tiny, tmp_path_factory) -> Path:
    """The tiny model in float32; two heads of keys and values."""
    return write_exact(tiny, tmp_path_factory.mktemp("models") / "exact")


@pytest.fixture(scope="session")
def stages(tiny, tmp_path_factory) -> Path:
    """A random model that mlx-lm splits by heads, of which it has four, and by layers."""
    folder = tmp_path_factory.mktemp("models") / "stages"
    config = toy_models.config("ministral3") | {
        "num_hidden_layers": LAYERS,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"] * 2,
        "sliding_window": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 1024,
        "max_position_embeddings": 4096,
        "eos_token_id": 0,
    }
    mx.random.seed(3)
    model = ministral3.Model(ministral3.ModelArgs.from_dict(config))
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny / name, folder)
    return folder


@pytest.fixture(scope="session")
def mixed(tmp_path_factory) -> Path:
    """A plan with a precision of its own for each layer, and one layer left as it is."""
    path = tmp_path_factory.mktemp("plans") / "kv_config.json"
    entries = [
        {"layer_idx": 0, "bits": 8, "group_size": 32},
        {"layer_idx": 1, "k_bits": 8, "v_bits": 6, "group_size": 32},
        {"layer_idx": 2, "bits": 6, "group_size": 32, "k_rotated": True, "v_rotated": True},
        {"layer_idx": 4, "k_bits": 16, "v_bits": 5, "group_size": 32},
        {"layer_idx": 5, "bits": 5, "group_size": 32},
    ]
    path.write_text(json.dumps(entries))
    return path
