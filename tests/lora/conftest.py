"""The tiny model in float32, and adapters of every form on it."""

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

from .real_peft import TOKENS

PATH = "model.layers.{}.self_attn.{}_proj"


def load_tensors(path) -> dict[str, mx.array]:
    """The tensors of a safetensors file."""
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    mx.eval(tensors)  # read lazily: the file may be written to next
    return tensors


@pytest.fixture
def exact(tiny):
    """The tiny model, freshly loaded in float32."""
    model = mlx_lm.load(str(tiny))[0]
    model.set_dtype(mx.float32)
    return model


@pytest.fixture(scope="session")
def recorded() -> Path:
    """Adapters made by real PEFT on the tiny model, and the logits it had with them."""
    return Path(__file__).resolve().parents[1] / "data" / "peft"


@pytest.fixture
def stored(tmp_path):
    """Writes an adapter in mlx-lm's form: ``stored(ranks, scale=..., notes=...)``."""

    def stored(ranks, *, scale=4.0, notes=None, name="adapter"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        tensors = {}
        mx.random.seed(1)
        for path, rank in ranks.items():
            out = 256 if "q_proj" in path else 128
            tensors[f"{path}.lora_a"] = mx.random.normal((128, rank)) * 0.05
            tensors[f"{path}.lora_b"] = mx.random.normal((rank, out)) * 0.05
        mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
        parameters = {"rank": max(ranks.values()), "scale": scale, "dropout": 0.0}
        config = {
            "fine_tune_type": "lora",
            "num_layers": -1,
            "lora_parameters": {**parameters, "keys": sorted({p[15:] for p in ranks})},
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
        if notes is not None:
            (folder / "optiq_lora_config.json").write_text(json.dumps(notes))
        return folder

    return stored


@pytest.fixture(scope="session")
def tokens():
    """The tokens that `real_peft` uses."""
    return mx.array(TOKENS)
