"""Saved prompt caches are checked before mlx-lm builds anything from them."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import cache as stock

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.kv import PackedKVCache, parse_spec, saved
from mlx_optiq_ext.kv.packed_array import Packed


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A file of a packed and a plain cache, its arrays and its metadata."""
    monkeypatch.setattr(stock, "PackedKVCache", PackedKVCache, raising=False)
    plan = parse_spec("k8v4")
    assert plan is not None
    assert plan.everywhere is not None
    caches: list[Any] = [PackedKVCache(stock.KVCache(), plan.everywhere), stock.KVCache()]
    for cache in caches:
        cache.update_and_fetch(mx.ones((1, 2, 5, 64)), mx.ones((1, 2, 5, 64)))
    path = tmp_path / "a.safetensors"
    stock.save_prompt_cache(str(path), caches, {"model": "m"})
    found: Any = mx.load(str(path), return_metadata=True)
    return path, *found


def load(path: Path) -> Any:
    return saved.load(lambda: stock.load_prompt_cache(str(path)), path)


def test_a_whole_file_loads(written):
    path, _, _ = written
    assert [type(cache).__name__ for cache in load(path)] == ["PackedKVCache", "KVCache"]


@pytest.mark.parametrize("spec", ["5p", "k4tv8", "k16v8g32"])
def test_bfloat16_and_nothing_load_as_they_were_saved(tmp_path, monkeypatch, spec):
    monkeypatch.setattr(stock, "PackedKVCache", PackedKVCache, raising=False)
    plan = parse_spec(spec)
    assert plan is not None
    assert plan.everywhere is not None
    caches: list[Any] = [PackedKVCache(stock.KVCache(), plan.everywhere) for _ in "ab"]
    keys, values = (mx.random.normal((1, 2, 12, dim)).astype(mx.bfloat16) for dim in (64, 128))
    caches[0].update_and_fetch(keys, values)
    path = tmp_path / "a.safetensors"
    stock.save_prompt_cache(str(path), caches)
    first, empty = load(path)
    for one, other in zip(caches[0].keys_and_values(), first.keys_and_values(), strict=True):
        one, other = (a.plain() if isinstance(a, Packed) else a for a in (one, other))
        assert mx.array_equal(one, other)
    assert empty.empty()


CHANGES = {
    "a list of a billion": (
        lambda a, m: a.update({"1000000000": mx.zeros(1)}),
        "do not make a list",
    ),
    "a list of a billion notes": (
        lambda a, m: m.update({"1.1000000000": "KVCache"}),
        "do not make a list",
    ),
    "names and numbers": (lambda a, m: m.update({"1.x": "KVCache"}), "do not make a list"),
    "deep names": (lambda a, m: a.update({"2" + ".0" * 40: mx.zeros(1)}), "nested deeper"),
    "deeper names": (
        lambda a, m: a.update({"2" + ".0" * 4000: mx.zeros(1)}),
        "more than 512",
    ),
    "an unknown class": (lambda a, m: m.update({"1.1": "Nothing"}), r"does not fit .*KeyError"),
    "a class of another kind": (lambda a, m: m.update({"1.1": "mx"}), "does not fit"),
    "codes of another width": (
        lambda a, m: a.update({"0.0.0.0": mx.zeros((1, 2, 256, 9), mx.uint32)}),
        r"the keys of a packed layer are mlx.core.uint32 \(1, 2, 256, 9\) where its format has",
    ),
    "a position without a length": (
        lambda a, m: a.update({"0.0.0.1": mx.zeros((1, 2, 9), mx.uint32)}),
        "a packed layer lacks values",
    ),
    "values of another length": (
        lambda a, m: a.update({"0.0.0.1": a["0.0.0.1"][:, :, :100]}),
        r"the values of a packed layer are .* where its format has",
    ),
    "codes of another dtype": (
        lambda a, m: a.update({"0.0.0.0": a["0.0.0.0"].astype(mx.float32)}),
        r"the keys of a packed layer are mlx.core.float32",
    ),
    "an end beyond its length": (
        lambda a, m: a.update({"0.0.0.2": mx.array(900)}),
        "a packed layer ends at 900",
    ),
    "too few arrays": (lambda a, m: a.pop("0.0.0.1"), "lacks arrays|does not fit"),
}


@pytest.mark.newest
@pytest.mark.parametrize("name", CHANGES)
def test_a_false_file_is_refused_in_one_sentence(written, name):
    path, arrays, metadata = written
    change, reason = CHANGES[name]
    change(arrays, metadata)
    mx.save_safetensors(str(path), arrays, metadata)
    with pytest.raises(InputError, match=reason) as raised:
        load(path)
    assert str(path) in str(raised.value)


@pytest.mark.newest
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"KVCache"', '"exec"'),
        ('"bits": 8', '"bits": 8.5'),
        ('"bits": 8', '"bits": true'),
        ('"dims": [64', '"dims": [1e9'),
        ('"dims": [64', '"dims": ["64"'),
        ('"dense": false', '"dense": 0'),
        ('"dtype": "float32"', '"dtype": "eval"'),
        ("{", "[" * 1000),
        ("}}", "}"),
    ],
)
def test_a_false_description_is_refused(written, before, after):
    path, arrays, metadata = written
    text = "".join(map(chr, arrays["0.1"].tolist()))
    assert before in text or before == "}}"
    changed = text.replace(before, after, 1) if before != "}}" else text[:-1]
    arrays["0.1"] = mx.array([ord(c) for c in changed])
    mx.save_safetensors(str(path), arrays, metadata)
    with pytest.raises(InputError, match="saved prompt cache"):
        load(path)


def test_a_file_without_packed_layers_is_left_to_mlx_lm(tmp_path):
    path = tmp_path / "a.safetensors"
    stock.save_prompt_cache(str(path), [stock.KVCache()])
    assert load(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(Exception, match=r"(?i)safetensors") as raised:
        load(path)
    assert not isinstance(raised.value, InputError)
