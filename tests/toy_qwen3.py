"""Random Qwen3 models small enough to be measured in a moment."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
from mlx_lm.models import qwen3, qwen3_moe
from mlx_lm.utils import save_model

TINY = Path(__file__).parent / "data" / "tiny-qwen3"
TEXT = "There are 12 apples in each box and Mia buys 7 boxes. How many apples are there? "


def toy_config(layers: int = 2, **changes) -> dict:
    """A Qwen3 small enough to be measured in a moment, with the tiny model's tokenizer."""
    config = json.loads((TINY / "config.json").read_text())
    config.update(hidden_size=64, intermediate_size=128, num_hidden_layers=layers, head_dim=32)
    config.update(num_attention_heads=2, num_key_value_heads=1)
    config.update(layer_types=["full_attention"] * layers, **changes)
    return config


def moe() -> qwen3_moe.Model:
    """A random two-layer model whose feed-forward is four experts, two of them used a token."""
    config = toy_config(
        model_type="qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        moe_intermediate_size=64,
        norm_topk_prob=True,
        rope_theta=10000.0,
    )
    mx.random.seed(0)
    return qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(config))


def write_toy(folder: Path, **changes) -> Path:
    """A random model on disk, loadable by mlx-lm."""
    config = toy_config(**changes)
    mx.random.seed(0)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, folder)
    return folder
