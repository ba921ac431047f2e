"""Small checkpoints in 8-bit floating point, with the names and dtypes of published ones."""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from toy_models import build, config
from toy_qwen3 import TINY

_BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
#: Family -> what its published config.json says of quantization.
FP8 = {
    "deepseek_v3": _BLOCKS,
    "deepseek_v32": _BLOCKS,
    "mimo_v2_flash": _BLOCKS,
    "minimax": _BLOCKS,
    "minimax_m3_vl": {"quant_method": "mxfp8", "weight_block_size": [1, 32]},
    "ministral3": {"quant_method": "fp8", "activation_scheme": "static"},
    "mistral4": _BLOCKS,
}

#: What mlx-lm calls the matrices of an expert, and what MiniMax does.
_EXPERT = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def write_fp8(name: str, folder: Path) -> Path:
    """A random toy of a family as its makers would publish it."""
    folder.mkdir(parents=True)
    settings = {**config(name), "quantization_config": FP8[name], "torch_dtype": "bfloat16"}
    tokens = {"vocab_size": 1024}
    part = settings.get("text_config")
    settings |= tokens if part is None else {"text_config": {**part, **tokens}}
    flat = tree_flatten(build(name, settings).parameters())
    assert isinstance(flat, list)
    stored: dict[str, mx.array] = {}
    for path, array in flat:
        for published, value in _experts(path, array.astype(mx.bfloat16)):
            stored |= _packed(name, published, value)
    mx.save_safetensors(str(folder / "model.safetensors"), stored)
    _rename(folder / "model.safetensors", "U8", "F8_E4M3")
    (folder / "config.json").write_text(json.dumps(settings))
    for each in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / each, folder)
    return folder


def wrap(folder: Path, wrapper: str) -> Path:
    """Make a checkpoint into that of a vision-language model around it."""
    path, settings = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    stored = mx.load(str(path))
    assert isinstance(stored, dict)
    mx.eval(stored)
    stored = {f"language_model.{name}": array for name, array in stored.items()}
    stored["vision_tower.patch_conv.weight"] = mx.ones((8, 16), mx.bfloat16)
    mx.save_safetensors(str(path), stored)
    _rename(path, "U8", "F8_E4M3")
    outer = {"model_type": wrapper, "vision_config": {}, "tie_word_embeddings": False}
    outer["quantization_config"] = settings.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps({**outer, "text_config": settings}))
    return folder


def _experts(path: str, array: mx.array) -> list[tuple[str, mx.array]]:
    """The experts of a stack one by one; anything else as it is."""
    found = re.fullmatch(r"(.*)\.switch_mlp\.(\w+)\.weight", path)
    if found is None:
        return [(path, array)]
    block, matrix = found.groups()
    matrix = _EXPERT[matrix] if block.endswith("block_sparse_moe") else matrix
    return [(f"{block}.experts.{i}.{matrix}.weight", each) for i, each in enumerate(array)]


def _packed(name: str, path: str, array: mx.array) -> dict[str, mx.array]:
    linear = (array.ndim == 2 and path.endswith("_proj.weight")) or ".experts." in path
    if not linear:
        return {path: array}
    scale = f"{path}_scale_inv"
    if name == "minimax_m3_vl":
        words, scales = tuple(mx.quantize(array, group_size=32, bits=8, mode="mxfp8"))
        return {path: words.view(mx.uint8), scale: scales}
    blocks = [-(-side // 128) for side in array.shape]
    scales = mx.full(blocks, 0.001, mx.float32)
    if name == "ministral3":
        scales = mx.array(0.001, mx.bfloat16)
    return {path: mx.to_fp8(array.astype(mx.float32) / 0.001), scale: scales}


def _rename(path: Path, old: str, new: str) -> None:
    """Call tensors of one dtype by another: MLX writes bytes only as U8."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end].replace(f'"{old}"'.encode(), f'"{new}"'.encode())
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
