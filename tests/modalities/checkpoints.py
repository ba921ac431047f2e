"""Small random checkpoints in the layout in which they are published."""

import copy
import importlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import MODEL_REMAPPING

DATA = Path(__file__).parent.parent / "data"
TOKENS = mx.array([[5, 17, 900, 42, 3, 3, 511, 64, 7, 8, 9, 250]])
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")

Weights = dict[str, mx.array]


@dataclass(frozen=True)
class Kind:
    """One kind of checkpoint: its small config and how its tensors are published.

    mlx-lm before ``since`` cannot load the published layout at all.
    """

    name: str
    text: str
    towers: tuple[str, ...]
    nested: bool = False
    publish: Callable[[Weights, dict], Weights] = field(default=lambda weights, config: weights)
    since: str = "0.30.4"

    def config(self) -> dict:
        return json.loads((DATA / "configs_small" / f"{self.name}.json").read_text())


def fused_experts(source: str, target: str, transposed: bool) -> Callable[[Weights, dict], Weights]:
    """gate_proj and up_proj of all experts in one tensor, as transformers keeps them."""

    def publish(weights: Weights, config: dict) -> Weights:
        result = dict(weights)
        for name in weights:
            if not name.endswith(f"{source}.gate_proj.weight"):
                continue
            prefix = name.removesuffix(f"{source}.gate_proj.weight")
            gate, up, down = (
                result.pop(f"{prefix}{source}.{n}_proj.weight") for n in ("gate", "up", "down")
            )
            fused = mx.concatenate([gate, up], axis=-2)
            if transposed:
                fused, down = fused.swapaxes(-1, -2), down.swapaxes(-1, -2)
            result[f"{prefix}{target}.gate_up_proj"] = fused
            result[f"{prefix}{target}.down_proj"] = down
        return result

    return publish


def gemma4(weights: Weights, config: dict) -> Weights:
    """Published shared layers have keys and values of their own, which nothing reads."""
    text = config["text_config"]
    result = fused_experts("experts.switch_glu", "experts", transposed=False)(weights, config)
    first = text["num_hidden_layers"] - text["num_kv_shared_layers"]
    for layer in range(first, text["num_hidden_layers"]):
        wide = text["layer_types"][layer] == "full_attention"
        head = text["global_head_dim" if wide else "head_dim"]
        attention = f"language_model.model.layers.{layer}.self_attn"
        rows = text["num_key_value_heads"] * head
        result[f"{attention}.k_proj.weight"] = mx.ones((rows, text["hidden_size"]))
        result[f"{attention}.v_proj.weight"] = mx.ones((rows, text["hidden_size"]))
        result[f"{attention}.k_norm.weight"] = mx.ones((head,))
    return result


def gemma3(weights: Weights, config: dict) -> Weights:
    """Embeddings are tied, and no tensor says otherwise."""
    return {k: v for k, v in weights.items() if "lm_head" not in k}


def qwen3_5(weights: Weights, config: dict) -> Weights:
    """Norms are published less one, convolutions transposed, and a draft head comes along."""
    experts = fused_experts("mlp.switch_mlp", "mlp.experts", transposed=False)
    result = experts(weights, config)
    norms = re.compile(r"(input_layernorm|post_attention_layernorm|model\.norm|[qk]_norm)\.weight$")
    for name, value in result.items():
        if "conv1d" in name:
            result[name] = value.moveaxis(1, 2)
        elif norms.search(name):
            result[name] = value - 1.0
    result["mtp.fc.weight"] = mx.ones((4, 4))
    return result


def kimi(weights: Weights, config: dict) -> Weights:
    """Experts one by one; keys and values come from one projection."""
    result: Weights = {}
    for name, value in weights.items():
        expert = re.match(r"(.*mlp)\.switch_mlp\.(.*)", name)
        if expert:
            for index in range(value.shape[0]):
                result[f"{expert[1]}.experts.{index}.{expert[2]}"] = value[index]
        elif name.endswith("embed_q.weight"):
            other = weights[name.replace("embed_q", "unembed_out")]
            joined = mx.concatenate([value.swapaxes(-1, -2), other], axis=1)
            result[name.replace("embed_q", "kv_b_proj")] = joined.reshape(-1, value.shape[-2])
        elif not name.endswith("unembed_out.weight"):
            result[name] = value
    return result


SIGLIP = ("vision_tower.vision_model.encoder.layers.0.fc1.weight", "multi_modal_projector.weight")
PIXTRAL = ("vision_tower.transformer.layers.0.attention.q_proj.weight", SIGLIP[1])
QWEN = ("model.visual.blocks.0.attn.qkv.weight", "model.visual.merger.norm.weight")
GEMMA4 = (
    "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight",
    "model.embed_vision.embedding_projection.weight",
)
AUDIO = (
    "model.audio_tower.layers.0.feed_forward1.ffw_layer_1.linear.input_max",
    "model.embed_audio.embedding_projection.weight",
)

# transformers checks its audio tower against the text model's real size, so no small one has a
# tokenizer; mlx-lm keeps the vision tower of this kind only.
MUSE_SPARK = Kind("muse_spark", "muse_spark", ())

KINDS = (
    Kind("gemma3", "gemma3_text", SIGLIP, publish=gemma3),
    Kind("gemma3n", "gemma3n", GEMMA4 + AUDIO),
    Kind("gemma4_e4b", "gemma4_text", GEMMA4 + AUDIO, True, gemma4, "0.32.0"),
    Kind("gemma4_moe", "gemma4_text", GEMMA4, nested=True, publish=gemma4),
    Kind("kimi_k25", "deepseek_v3", ("vision_tower.patch_embed.proj.weight",), publish=kimi),
    Kind(
        "llama4",
        "llama4",
        ("vision_model.class_embedding", "multi_modal_projector.linear_1.weight"),
        publish=fused_experts("feed_forward.experts", "feed_forward.experts", transposed=True),
    ),
    Kind("ministral3", "ministral3", PIXTRAL),
    Kind("mistral3", "llama", PIXTRAL),
    Kind("qwen2_vl", "qwen2", ("visual.blocks.0.attn.qkv.weight",)),
    Kind("qwen3_5", "qwen3_5", QWEN, nested=True, publish=qwen3_5),
    Kind("qwen3_5_moe", "qwen3_5_moe", QWEN, nested=True, publish=qwen3_5),
    Kind("qwen3_vl", "qwen3", QWEN, nested=True, since="0.32.0"),
    Kind(
        "qwen3_vl_moe",
        "qwen3_moe",
        QWEN,
        nested=True,
        publish=fused_experts("mlp.switch_mlp", "mlp.experts", transposed=True),
        since="0.32.0",
    ),
)


def tensors(model: Any) -> Weights:
    """A model's tensors by name."""
    flat: Any = tree_flatten(model.parameters())
    return dict(flat)


def write(kind: Kind, folder: Path) -> Path:
    """Write a checkpoint as published: Hugging Face's names, towers and processor files.

    Skips the test if the installed mlx-lm cannot load it.
    """
    installed = tuple(map(int, re.findall(r"\d+", metadata.version("mlx-lm"))[:3]))
    if installed < tuple(map(int, kind.since.split("."))):
        pytest.skip(f"mlx-lm loads a published {kind.name} since {kind.since}")
    config = kind.config()
    name = MODEL_REMAPPING.get(config["model_type"], config["model_type"])
    module = pytest.importorskip(f"mlx_lm.models.{name}")
    arguments = copy.deepcopy(config)
    if "text_config" in arguments:
        # transformers hands it down; mlx-lm's Qwen3-VL MoE does not, see handed_down().
        text = arguments["text_config"]
        text.setdefault("tie_word_embeddings", config.get("tie_word_embeddings", False))
    mx.random.seed(7)
    model = module.Model(module.ModelArgs.from_dict(arguments))
    # Norms are all ones in a new model, which would hide a mix-up.
    weights: Weights = {
        path: value if value.ndim > 1 else value + 0.1 * mx.random.normal(value.shape)
        for path, value in tensors(model).items()
    }
    weights = kind.publish(weights, config)
    if kind.nested:
        weights = {_nested(path): value for path, value in weights.items()}
    weights |= {tower: mx.random.normal((8, 16)) for tower in kind.towers}
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DATA / "tiny-qwen3" / name, folder)
    for name in PROCESSORS:
        (folder / name).write_text('{"processor_class": "SomeProcessor"}')
    return folder


def _nested(path: str) -> str:
    if path.startswith("language_model.model."):
        return path.replace("language_model.model.", "model.language_model.", 1)
    return path.removeprefix("language_model.")


def text_class(kind: Kind) -> type:
    """The class that bare mlx-lm is to load the text model with."""
    return importlib.import_module(f"mlx_lm.models.{kind.text}").Model
