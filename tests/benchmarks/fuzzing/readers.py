"""Every reader of untrusted files, with a small valid file of each kind that it reads."""

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as stock_caches

from mlx_optiq_ext import files
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
from mlx_optiq_ext.weights.candidates import Size, Tensor
from mlx_optiq_ext.weights.plan_file import read_plan
from mlx_optiq_ext.weights.precision import Precision
from mlx_optiq_ext.yolo.detection.labels import read_labels
from mlx_optiq_ext.yolo.reading import checkpoint

from . import samples

DATA = Path(__file__).resolve().parents[2] / "data"


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
    weights = samples.file_of(scratch, samples.weights)
    config = (DATA / "tiny-qwen3" / "config.json").read_bytes()
    return {
        "config and headers": Reader(
            {"config.json": config, "model.safetensors": weights}, _read_model
        ),
        "headers of towers": Reader({"model.safetensors": weights}, leftovers.tower_tensors),
        "plan": Reader({"plan.json": samples.as_json(samples.plan())}, _read_plan),
        "measured KL": Reader(
            {"optiq_metadata.json": samples.as_json(samples.plan())},
            lambda folder: measured_kl(str(folder), dict.fromkeys(samples.LAYERS)),
        ),
        "KV plan": Reader(
            {"kv_config.json": samples.as_json(samples.kv_plan())},
            lambda f: read_kv_plan(f / "kv_config.json"),
        ),
        "saved prompt cache": Reader(
            {"a.safetensors": samples.file_of(scratch, samples.caches)}, _read_caches
        ),
        "adapter": Reader(
            {**notes, "adapters.safetensors": (lora / "adapters.safetensors").read_bytes()},
            _read_adapter,
        ),
        "PEFT adapter": Reader(peft, _read_adapter),
        "calibration": Reader(
            {
                "a.jsonl": samples.as_lines(samples.TEXTS),
                "b.jsonl": samples.as_lines(samples.TEXTS[:1]),
            },
            lambda f: [read_texts(f / name) for name in ("a.jsonl", "b.jsonl")],
        ),
        "test items": Reader(
            {
                "a.jsonl": samples.as_lines(
                    [{"question": "1 + 1?", "answer": "1 + 1 = 2 #### 2"}] * 3
                )
            },
            lambda f: word_problems.read_items(f / "a.jsonl"),
        ),
        "cached measurements": Reader(
            {"a.jsonl": samples.as_lines([{"key": ["a", 4, 64], "value": 0.5, "name": "n"}] * 3)},
            _read_measurements,
        ),
        "chip": Reader(
            {"chip.json": samples.as_json(samples.CHIP)}, lambda f: read_chip(f / "chip.json")
        ),
        "COCO labels": Reader(
            {"a.json": samples.as_json(samples.LABELS)}, lambda f: read_labels(f / "a.json", 2)
        ),
        "tokenizer config": Reader(
            {"tokenizer_config.json": samples.as_json(samples.TOKENIZER)},
            leftovers.remove_processor_files,
        ),
        "request": Reader({"a.json": samples.as_json(samples.REQUEST)}, _read_request),
        "YOLO .pt": Reader({"a.pt": samples.torch_file()}, lambda f: checkpoint.read(f / "a.pt")),
        "YOLO .npz": Reader({"a.npz": samples.npz()}, lambda f: checkpoint.read(f / "a.npz")),
        "YOLO .safetensors": Reader(
            {"a.safetensors": samples.file_of(scratch, samples.detector)},
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


def _read_model(folder: Path) -> None:
    layout_of(*read_headers(str(folder)))


def _read_plan(folder: Path) -> None:
    choices = tuple(Precision(bits, 64) for bits in (2, 4, 8))
    tensors = tuple(Tensor(name, (128, 128), 16, choices) for name in samples.LAYERS)
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
