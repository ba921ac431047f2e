"""Every architecture of the installed mlx-lm under a KV plan works, or refuses with a reason."""

import copy
import importlib
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import cache as stock
from toy_models import FAMILIES, UNSAFE, UNSUPPORTED, build

import mlx_optiq_ext
from mlx_optiq_ext import kv
from mlx_optiq_ext.errors import UnsupportedError

assert mlx_optiq_ext.__version__  # attention over packed keys is patched in
# The package's attribute of this name is the function.
generating: Any = importlib.import_module("mlx_lm.generate")
PROMPT = mx.array([[5, 9, 20, 31, 7, 44, 81, 3]])
ROWS = ([5, 9, 20], [8, 8, 60, 2, 64], [12, 90, 77, 4])

#: Architecture -> why it keeps no keys and values that could be packed.
REFUSED = {
    "deepseek_v41": "its layers share one cache object of their own kind",
    "iquestloopcoder": "two caches a layer, read across, and handed over as a list",
    "mamba": "recurrent",
    "mamba2": "recurrent",
    "rwkv7": "recurrent",
}
NEWEST = hasattr(stock.KVCache, "keys_and_values")
if not NEWEST:
    why = "before mlx-lm 0.32 its layers read another's cache through its saved state"
    REFUSED.update(afm7=why, gemma3n=why)
#: Before 0.32 llama4's caches lose track, and a cache that no layer uses has no state.
FAULTY = () if NEWEST else ("llama4", "nemotron-nas")
#: Stock mlx-lm itself gives a batch other logits than its rows alone.
UNEVEN = {"afm7", "minimax_m3_vl"}
NAMES = [name for name in FAMILIES if name not in UNSUPPORTED and name not in UNSAFE]


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    """Compiling hundreds of small kernels takes longer than running them."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def distance(found: mx.array, expected: mx.array) -> float:
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    finite = mx.isfinite(expected)  # phi3small rules tokens out
    found, expected = mx.where(finite, found, 0), mx.where(finite, expected, 0)
    return float(mx.abs(found - expected).max() / mx.abs(expected).max())


def run(model: Any, caches: list[Any]) -> mx.array:
    first = model(PROMPT, cache=caches)
    return mx.concatenate([first, model(PROMPT[:, :1], cache=caches)], axis=1)


@pytest.mark.parametrize("name", NAMES)
def test_architecture(name, tmp_path, monkeypatch):
    model = build(name)
    spec = kv.parse_spec("8")
    assert spec is not None
    if name in REFUSED:
        with pytest.raises(UnsupportedError, match=r"keeps no keys and values|cannot work with"):
            kv.mount(model, spec)
        return
    expected = run(model, stock.make_prompt_cache(model))
    mounted = kv.mount(model, spec, mergeable=NEWEST)
    assert mounted.formats
    assert distance(run(model, kv.make_caches(model)), expected) < 0.1
    if name not in FAULTY:
        _generated(model, expected)
    if NEWEST:  # older releases cannot save every kind, or load it back, packed or not
        _saved(model, tmp_path / "cache.safetensors", monkeypatch)
    if name != "llama4" or name not in FAULTY:
        _trimmed(model, expected)
    _batched(name, model)
    _transformed(model, tmp_path / "transformed.safetensors", monkeypatch)


def _transformed(model: Any, path, monkeypatch) -> None:
    """Keys of few bits are transformed, by what a model's own run says of them."""
    spec = kv.parse_spec("4")
    assert spec is not None
    kv.mount(model, spec, mergeable=NEWEST)
    assert mx.isfinite(run(model, kv.make_caches(model))[:, -1, :8]).all()
    if NEWEST:
        _saved(model, path, monkeypatch)


def _generated(model: Any, expected: mx.array) -> None:
    caches = kv.make_caches(model)
    steps = generating.generate_step(PROMPT[0], model, max_tokens=3, prompt_cache=caches)
    tokens, logprobs = zip(*steps, strict=True)
    assert len(tokens) == 3
    assert tokens[0] == int(logprobs[0].argmax())
    first = expected[0, PROMPT.shape[1] - 1]
    assert distance(logprobs[0], first - mx.logsumexp(first)) < 0.1


def _saved(model: Any, path, monkeypatch) -> None:
    monkeypatch.setattr(stock, "PackedKVCache", kv.PackedKVCache, raising=False)
    caches = kv.make_caches(model)
    model(PROMPT, cache=caches)
    assert all(cache.nbytes >= 0 for cache in caches if isinstance(cache, kv.PackedKVCache))
    stock.save_prompt_cache(str(path), caches)
    loaded: Any = stock.load_prompt_cache(str(path))
    again = model(PROMPT[:, :1], cache=loaded)
    assert distance(again, model(PROMPT[:, :1], cache=copy.deepcopy(caches))) < 1e-4


def _trimmed(model: Any, expected: mx.array) -> None:
    caches = kv.make_caches(model)
    model(PROMPT, cache=caches)
    if stock.can_trim_prompt_cache(caches):
        stock.trim_prompt_cache(caches, 3)
        assert distance(model(PROMPT[:, 5:], cache=caches), expected[:, 5:8]) < 0.1


def _batched(name: str, model: Any) -> None:
    alone = [kv.make_caches(model) for _ in ROWS]
    mounted = kv.mounted_on(model)
    assert mounted is not None
    if not mounted.mergeable or not all(hasattr(cache, "merge") for cache in alone[0]):
        return
    for tokens, caches in zip(ROWS, alone, strict=True):
        model(mx.array([tokens]), cache=caches)
    batch = [row[0].merge(list(row)) for row in zip(*alone, strict=True)]
    following = mx.array([[1], [2], [3]])
    together = model(following, cache=batch)
    each = [model(following[i : i + 1], cache=caches) for i, caches in enumerate(alone)]
    if name not in UNEVEN:
        assert distance(together, mx.concatenate(each)) < 1e-4
    for cache in batch:
        cache.filter([0, 2])
    model(following[:1], cache=[cache.extract(1) for cache in batch])
