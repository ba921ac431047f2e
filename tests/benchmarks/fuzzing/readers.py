"""Every reader of untrusted files, with a small valid file of each kind that it reads."""

import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as stock_caches

from mlx_optiq_ext import files, kv
from mlx_optiq_ext.adapters.requests import Refusal, read_body
from mlx_optiq_ext.errors import UnsupportedError
from mlx_optiq_ext.evaluation import word_problems
from mlx_optiq_ext.evaluation.journal import Journal as Items
from mlx_optiq_ext.kv import saved
from mlx_optiq_ext.kv.plan import read_plan as read_kv_plan
from mlx_optiq_ext.latency.chips import read_chip
from mlx_optiq_ext.latency.layout import layout_of
from mlx_optiq_ext.lora.forms.location import readable_by_stock
from mlx_optiq_ext.lora.forms.reading import read_adapter
from mlx_optiq_ext.lora.rank_scaling import measured_kl
from mlx_optiq_ext.modalities import leftovers
from mlx_optiq_ext.model.headers import read_headers
from mlx_optiq_ext.planning.journal import Journal as Measurements
from mlx_optiq_ext.planning.texts import read_texts
from mlx_optiq_ext.weights.plan_file import read_plan
from mlx_optiq_ext.weights.precision import Precision, Size, Tensor
from mlx_optiq_ext.yolo.detection.labels import read_labels
from mlx_optiq_ext.yolo.reading import checkpoint

DATA = Path(__file__).resolve().parents[2] / "data"
LAYERS = [f"model.layers.{n}.{m}" for n in range(2) for m in ("self_attn.q_proj", "mlp.up_proj")]


@dataclass(frozen=True)
class Reader:
    """A reader of a folder's files.

    Attributes:
        files: Name -> valid content; each of them is damaged in turn.
        read: Reads the folder; raises an OptiqError or returns.
        warm: Mutations that are read before anything is watched.
    """

    files: dict[str, bytes]
    read: Callable[[Path], Any]
    warm: int = 50


def all_readers(scratch: Path) -> dict[str, Reader]:
    """The readers by name; ``scratch`` is an empty folder to make files in."""
    lora = DATA / "peft" / "ours"
    notes = {name: (lora / name).read_bytes() for name in ("adapter_config.json",)}
    notes["optiq_lora_config.json"] = (lora / "optiq_lora_config.json").read_bytes()
    peft = {
        name: (DATA / "peft" / "mixed" / name).read_bytes()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    weights = _saved(scratch, _weights)
    config = (DATA / "tiny-qwen3" / "config.json").read_bytes()
    return {
        "config and headers": Reader(
            {"config.json": config, "model.safetensors": weights}, _read_model
        ),
        "headers of towers": Reader({"model.safetensors": weights}, leftovers.tower_tensors),
        "plan": Reader({"plan.json": _json(_plan())}, _read_plan),
        "measured KL": Reader(
            {"optiq_metadata.json": _json(_plan())},
            lambda folder: measured_kl(str(folder), dict.fromkeys(LAYERS)),
        ),
        "KV plan": Reader(
            {"kv_config.json": _json(_kv_plan())}, lambda f: read_kv_plan(f / "kv_config.json")
        ),
        "saved prompt cache": Reader({"a.safetensors": _saved(scratch, _caches)}, _read_caches),
        "adapter": Reader(
            {**notes, "adapters.safetensors": (lora / "adapters.safetensors").read_bytes()},
            _read_adapter,
        ),
        "PEFT adapter": Reader(peft, _read_adapter),
        "calibration": Reader(
            {"a.jsonl": _lines(TEXTS), "b.jsonl": _lines(TEXTS[:1])},
            lambda f: [read_texts(f / name) for name in ("a.jsonl", "b.jsonl")],
        ),
        "test items": Reader(
            {"a.jsonl": _lines([{"question": "1 + 1?", "answer": "1 + 1 = 2 #### 2"}] * 3)},
            lambda f: word_problems.read_items(f / "a.jsonl"),
        ),
        "cached measurements": Reader(
            {"a.jsonl": _lines([{"key": ["a", 4, 64], "value": 0.5, "name": "n"}] * 3)},
            _read_measurements,
        ),
        "chip": Reader({"chip.json": _json(CHIP)}, lambda f: read_chip(f / "chip.json")),
        "COCO labels": Reader({"a.json": _json(LABELS)}, lambda f: read_labels(f / "a.json", 2)),
        "tokenizer config": Reader(
            {"tokenizer_config.json": _json(TOKENIZER)}, leftovers.remove_processor_files
        ),
        "request": Reader({"a.json": _json(REQUEST)}, _read_request),
        "YOLO .pt": Reader({"a.pt": _torch_file()}, lambda f: checkpoint.read(f / "a.pt")),
        "YOLO .npz": Reader({"a.npz": _npz()}, lambda f: checkpoint.read(f / "a.npz")),
        "YOLO .safetensors": Reader(
            {"a.safetensors": _saved(scratch, _detector)},
            lambda f: checkpoint.read(f / "a.safetensors"),
        ),
    }


def broken_readers() -> dict[str, Reader]:
    """Readers that do what none may, by what that is: they show that it is noticed."""

    def behave(harm: Callable[[], Any]) -> Callable[[Path], None]:
        def read(folder: Path) -> None:
            if (folder / "a.json").read_bytes() != b"{}":
                harm()

        return read

    def spin() -> None:
        while True:
            pass

    harms: dict[str, Callable[[], Any]] = {
        "raises": lambda: [][0],
        "hangs": spin,
        "fills memory": lambda: bytearray(1 << 30),
        "runs": lambda: os.system("true"),
        "dies": lambda: os._exit(1),
    }
    return {
        f"broken: {name}": Reader({"a.json": b"{}"}, behave(harm), warm=0)
        for name, harm in harms.items()
    }


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
    "rates_gbs": [[4.5, 300.0], [16.0, 380.0]],
    "overlapped": True,
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


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _lines(values: list[Any]) -> bytes:
    return b"\n".join(map(_json, values))


def _saved(scratch: Path, write: Callable[[str], None]) -> bytes:
    path = scratch / "a.safetensors"
    write(str(path))
    return path.read_bytes()


def _weights(path: str) -> None:
    shapes = {f"{name}.weight": (8, 8) for name in LAYERS}
    arrays = {name: mx.zeros(shape, mx.bfloat16) for name, shape in shapes.items()}
    arrays["model.embed_tokens.weight"] = mx.zeros((16, 8))
    arrays["vision_tower.blocks.0.attn.weight"] = mx.zeros((4, 4), mx.uint32)
    mx.save_safetensors(path, arrays, {"format": "mlx"})


def _caches(path: str) -> None:
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


def _plan() -> dict[str, Any]:
    each = {name: {"bits": 4, "group_size": 64, "kl": 0.01} for name in LAYERS}
    each[LAYERS[0]] = {"bits": 16, "group_size": 0, "kl": 0.0}
    return {"method": "taylor", "target_bpw": 4.5, "achieved_bpw": 4.4, "per_layer": each}


def _kv_plan() -> list[dict[str, Any]]:
    turbo = {"layer_idx": 2, "bits": 4, "method": "turboquant", "seed": 3}
    sides = {"k_bits": 8, "v_bits": 16, "k_group_size": 32, "k_rotated": True}
    return [{"layer_idx": 0, "bits": 8, "group_size": 64}, {"layer_idx": 1, **sides}, turbo]


def _detector(path: str) -> None:
    mx.save_safetensors(path, {name: mx.ones((16, 1, 1, 1)) for name in DETECTOR})


def _npz() -> bytes:
    stream = io.BytesIO()
    arrays: Any = {name: np.ones((16, 1, 1, 1), np.float16) for name in DETECTOR}
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def _torch_file() -> bytes:
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


def _read_model(folder: Path) -> None:
    layout_of(*read_headers(str(folder)))


def _read_plan(folder: Path) -> None:
    choices = tuple(Precision(bits, 64) for bits in (2, 4, 8))
    tensors = tuple(Tensor(name, (128, 128), 16, choices) for name in LAYERS)
    read_plan(folder / "plan.json", tensors, Size(4 * 128 * 128, 1000))


def _read_adapter(folder: Path) -> None:
    readable_by_stock(folder)
    read_adapter(folder)


def _read_caches(folder: Path) -> None:
    path = folder / "a.safetensors"

    def stock() -> Any:
        try:
            return stock_caches.load_prompt_cache(str(path))
        except Exception as error:
            header = files.read_header(path)  # refuses what mlx-lm itself stumbles over
            if "PackedKVCache" in header.metadata.values():
                raise
            raise UnsupportedError("without packed layers this is mlx-lm's file") from error

    mx.eval([cache.state for cache in saved.load(stock, path) if not cache.empty()])


def _read_measurements(folder: Path) -> None:
    whole = Measurements(None)
    whole.path = folder / "a.jsonl"
    whole._read()
    (folder / "a.jsonl").rename(folder / "items.jsonl")
    Items(folder).items()


def _read_request(folder: Path) -> None:
    body = (folder / "a.json").read_bytes()
    try:
        read_body(str(len(body)), io.BytesIO(body))
    except Refusal as error:
        raise UnsupportedError(error.message) from error
