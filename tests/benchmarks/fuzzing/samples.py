"""A small valid file of each kind that is read."""

import io
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as stock_caches

from mlx_optiq_ext import kv
from mlx_optiq_ext.latency.measured import VERSION

#: Names of quantizable layers.
LAYERS = [f"model.layers.{n}.{m}" for n in range(2) for m in ("self_attn.q_proj", "mlp.up_proj")]
TEXTS = [
    {"text": "The quick brown fox, [and] {others}."},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"prompt": "1 + 1", "completion": "2"},
    {"question": "1 + 1", "answer": "2"},
]
#: What a YOLO26 is known by.
DETECTOR = ("model.0.conv.weight", *(f"model.1.one2one_cv3.{n}.2.weight" for n in range(3)))
CHIP = {
    "name": "a chip",
    "bandwidth_gbs": 400.0,
    "tflops": 14.2,
    "launch_us": 3.5,
    "measured": {
        "version": VERSION,
        "launch_us": 3.5,
        "gap_us": 1.5,
        "products": [
            {
                "dtype": "bfloat16",
                "bits": 4.5,
                "quantized": True,
                "gbs": 300.0,
                "tflops": 9.5,
                "setup_ps": 0.5,
            },
            {"dtype": "bfloat16", "bits": 16, "quantized": False, "gbs": 380.0, "tflops": 11.0},
        ],
        "layers": [
            {"dtype": "bfloat16", "cache_gbs": 300, "attention_tflops": 5, "element_ns": 0.1}
        ],
        "failed": ["float16 products: out of memory"],
    },
    "generation": 3,
    "dies": 1,
}
LABELS = {
    "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(2)],
    "categories": [{"id": 1, "name": "cat"}, {"id": 7, "name": "dog"}],
    "annotations": [
        {"image_id": n, "category_id": 7, "bbox": [1, 2.5, 30, 40], "iscrowd": 0} for n in range(2)
    ],
}
TOKENIZER = {
    "tokenizer_class": "A",
    "processor_class": "B",
    "auto_map": {"AutoProcessor": "x.Y", "AutoTokenizer": ["x.Z", None]},
    "model_max_length": int(1e30),
    "added_tokens_decoder": {"0": {"content": "<s>", "special": True}},
}
REQUEST = {"lora_name": "a", "lora_path": "/a", "load_inplace": False, "n": [1, 2.5, None]}


def as_json(value: Any) -> bytes:
    """A value as JSON."""
    return json.dumps(value).encode()


def as_lines(values: list[Any]) -> bytes:
    """Values as lines of JSON."""
    return b"\n".join(map(as_json, values))


def file_of(scratch: Path, write: Callable[[str], None]) -> bytes:
    """The safetensors file that ``write`` writes."""
    path = scratch / "a.safetensors"
    write(str(path))
    return path.read_bytes()


def weights(path: str) -> None:
    """A model of two layers and a vision tower."""
    shapes = {f"{name}.weight": (8, 8) for name in LAYERS}
    arrays = {name: mx.zeros(shape, mx.bfloat16) for name, shape in shapes.items()}
    arrays["model.embed_tokens.weight"] = mx.zeros((16, 8))
    arrays["vision_tower.blocks.0.attn.weight"] = mx.zeros((4, 4), mx.uint32)
    mx.save_safetensors(path, arrays, {"format": "mlx"})


def caches(path: str) -> None:
    """A prompt cache of packed and plain layers."""
    stock_caches.__dict__.setdefault("PackedKVCache", kv.PackedKVCache)
    found = kv.parse_spec("k8v4g32")
    assert found is not None
    assert found.everywhere is not None
    caches: list[Any] = [
        kv.PackedKVCache(stock_caches.KVCache(), found.everywhere, interleaved=False),
        kv.PackedKVCache(stock_caches.RotatingKVCache(max_size=8), found.everywhere),
        stock_caches.KVCache(),
    ]
    for cache in caches:
        cache.update_and_fetch(mx.ones((1, 1, 2, 32)), mx.ones((1, 1, 2, 32)))
    stock_caches.save_prompt_cache(path, caches, {"model": "m"})


def plan() -> dict[str, Any]:
    """An ``optiq_metadata.json``."""
    each = {name: {"bits": 4, "group_size": 64, "kl": 0.01} for name in LAYERS}
    each[LAYERS[0]] = {"bits": 16, "group_size": 0, "kl": 0.0}
    return {"method": "taylor", "target_bpw": 4.5, "achieved_bpw": 4.4, "per_layer": each}


def kv_plan() -> list[dict[str, Any]]:
    """A ``kv_config.json``."""
    turbo = {"layer_idx": 2, "bits": 4, "method": "turboquant", "seed": 3}
    sides = {"k_bits": 8, "v_bits": 16, "k_group_size": 32, "k_rotated": True}
    return [{"layer_idx": 0, "bits": 8, "group_size": 64}, {"layer_idx": 1, **sides}, turbo]


def detector(path: str) -> None:
    """A detector's tensors."""
    mx.save_safetensors(path, {name: mx.ones((16, 1, 1, 1)) for name in DETECTOR})


def npz() -> bytes:
    """A detector as a NumPy archive."""
    stream = io.BytesIO()
    arrays: Any = {name: np.ones((16, 1, 1, 1), np.float16) for name in DETECTOR}
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def torch_file() -> bytes:
    """An Ultralytics checkpoint as torch.save writes it."""
    names = ("torch", "torch._utils", "ultralytics", "ultralytics.nn")
    modules = {name: ModuleType(name) for name in names}

    def known(module: str, name: str, value: Any) -> Any:
        value.__module__, value.__qualname__ = module, name
        setattr(modules[module], name, value)
        return value

    storage = known("torch", "FloatStorage", type("FloatStorage", (), {}))
    rebuild = known("torch._utils", "_rebuild_tensor_v2", lambda *_: None)
    module = known("ultralytics.nn", "Model", type("Model", (), {}))
    stored: dict[str, bytes] = {}

    class Data:
        pass

    class Tensor:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if not isinstance(obj, Data):
                return None
            key = str(len(stored))
            stored[key] = np.arange(16, dtype=np.float32).tobytes()
            return ("storage", storage, key, "cpu", 16)

        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, Tensor):
                return rebuild, (Data(), 0, (16, 1, 1, 1), (1, 1, 1, 1), False, {})
            return NotImplemented

    def made() -> Any:
        found = module()
        found.__dict__ = {"_parameters": {}, "_buffers": {}, "_modules": {}}
        return found

    root = made()
    root.names = {0: "cat", 1: "dog"}
    for name in DETECTOR:
        holder = root
        for part in name.split(".")[:-1]:
            holder = holder.__dict__["_modules"].setdefault(part, made())
        holder.__dict__["_parameters"]["weight"] = Tensor()
    stream = io.BytesIO()
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        tree = {"model": root, "ema": None, "epoch": -1, "args": {"lr": 0.1, "seed": 1 << 40}}
        Pickler(stream, protocol=2).dump({**tree, "path": Path("a"), "set": {1, 2}})
    finally:
        for name, value in before.items():
            sys.modules.pop(name)
            if value is not None:
                sys.modules[name] = value
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("a/data.pkl", stream.getvalue())
        for key, data in stored.items():
            archive.writestr(f"a/data/{key}", data)
    return whole.getvalue()
