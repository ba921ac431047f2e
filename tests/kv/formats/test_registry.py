"""A format from outside: one file, registered, then a format like ours."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import cache as stock

from mlx_optiq_ext import kv
from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.kv.formats import Affine, register, unregister
from mlx_optiq_ext.kv.plan import entries

from ..conftest import PROBLEMS, serve

SOURCE = Path(__file__).resolve().parents[2] / "plugin_example" / "optiq_example_int8.py"
HOOK = """

from mlx_optiq_ext import hookimpl


@hookimpl
def optiq_kv_formats():
    return [Int8]
"""


@pytest.fixture
def int8():
    """The example's format, registered for one test."""
    spec = importlib.util.spec_from_file_location("optiq_example_int8", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    register(module.Int8)
    yield module.Int8
    unregister(module.Int8)


def test_specs_name_it_by_its_letter(int8):
    for text, keys, values in (("8s", int8(), int8()), ("k8sv4g32", int8(), Affine(4, 32, None))):
        plan = kv.parse_spec(text)
        assert plan is not None
        assert plan.everywhere == kv.LayerFormat(keys, values)
    with pytest.raises(InputError, match="--optiq-kv 7s: int8 has 8 bits, not 7"):
        kv.parse_spec("7s")


def test_without_it_the_letter_means_nothing():
    assert kv.parse_spec("8s") is None


def test_files_name_it_by_its_method(int8, tmp_path):
    layers = {
        0: kv.LayerFormat(int8(), int8()),
        1: kv.LayerFormat(int8(), Affine(4, 64)),
        2: kv.LayerFormat(None, int8()),
    }
    path = tmp_path / "kv_config.json"
    path.write_text(json.dumps(entries(layers)))
    assert kv.read_plan(path).layers == layers
    assert entries(layers)[0] == {"layer_idx": 0, "bits": 8, "method": "int8"}
    path.write_text(json.dumps([{"layer_idx": 0, "bits": 4, "method": "int8"}]))
    with pytest.raises(InputError, match="entry 0: int8 has 8 bits, not 4"):
        kv.read_plan(path)


@pytest.mark.parametrize("other", [None, Affine(3, 32)], ids=["alone", "beside affine"])
def test_caches_keep_save_and_restore_it(int8, other, tmp_path, monkeypatch):
    monkeypatch.setattr(stock, "PackedKVCache", kv.PackedKVCache, raising=False)
    formats = kv.LayerFormat(int8(), other or int8())
    cache = kv.PackedKVCache(stock.KVCache(), formats)
    rows = mx.random.normal((1, 2, 20, 64))
    keys, _ = cache.update_and_fetch(rows, rows)
    assert mx.allclose(keys.plain(), rows, atol=0.02)
    file = str(tmp_path / "cache.safetensors")
    stock.save_prompt_cache(file, [cache])
    loaded: Any = stock.load_prompt_cache(file)[0]
    assert loaded.formats == formats
    keys, values = loaded.update_and_fetch(rows[:, :, :1], rows[:, :, :1])
    assert keys.shape == values.shape == (1, 2, 21, 64)


@pytest.mark.parametrize("name", ["cpu", "metal", "cuda"])
def test_every_platform_attends_to_it(int8, name):
    queries, keys, values = mx.random.normal((3, 1, 2, 9, 64))
    keys, values = (kv.Packed(int8().pack(a), int8()) for a in (keys, values))
    found = kv.attend(queries, keys, values, scale=0.1, mask="causal", platform=kv.Platform(name))
    expected = mx.fast.scaled_dot_product_attention(
        queries, keys.plain(), values.plain(), scale=0.1, mask="causal"
    )
    assert mx.allclose(found, expected, atol=1e-5)


def test_stock_commands_serve_with_it(exact, plugin, tmp_path, monkeypatch, run):
    environment = plugin({}, "optiq_int8", SOURCE.read_text() + HOOK)
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    with serve(tmp_path / "log", "--model", exact, "--optiq-kv", "8s") as server:
        assert server.ask(PROBLEMS[0]).strip().endswith("#### 38")
    saved = tmp_path / "saved.safetensors"
    words = ("--model", exact, "--prompt", PROBLEMS[0])
    run(
        *("mlx_lm.cache_prompt", *words, "--prompt-cache-file", saved, "--optiq-kv", "8s"),
        env=environment,
        check=True,
    )
    answer = run(
        *("mlx_lm.generate", "--model", exact, "--prompt", " ", "--max-tokens", "4"),
        *("--prompt-cache-file", saved),
        env=environment,
        check=True,
    )
    assert "==========" in answer.stdout


def test_names_and_letters_belong_to_one_format(int8):
    @dataclass(frozen=True)
    class Other(int8):
        name = "other"

    register(int8)  # again
    with pytest.raises(InputError, match="the letter 's' belongs to 'int8'"):
        register(Other)
    Other.letters = {"g": {}}
    with pytest.raises(InputError, match="'g' is not one letter"):
        register(Other)
    Other.name = Affine.name
    with pytest.raises(InputError, match="'affine' is registered already"):
        register(Other)
