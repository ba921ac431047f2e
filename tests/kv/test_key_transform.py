"""Transforms of keys: attention does not see them, and what outliers cost is gone."""

import copy
import pickle
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import cache as stock
from toy_models import build

from mlx_optiq_ext import kv
from mlx_optiq_ext.errors import InputError, UnsupportedError
from mlx_optiq_ext.kv import LayerFormat, PackedKVCache, attend, transform_file
from mlx_optiq_ext.kv.formats import Affine, KeyTransform
from mlx_optiq_ext.kv.formats.key_transform import fitted
from mlx_optiq_ext.kv.key_statistics import context, transforms

from .conftest import saved

HEADS, DIM = 2, 64
BATCHED = hasattr(stock.KVCache, "keys_and_values")


def keys_of(tokens: int, rows: int = 1, seed: int = 0) -> mx.array:
    """Correlated keys, some channels far from zero or far wider than others."""
    key = mx.random.key(seed)
    keys = mx.random.normal((rows, HEADS, tokens, DIM), key=key)
    spread = mx.where(mx.arange(DIM) % 16 == 3, 20.0, 1.0)
    keys = keys * spread + mx.where(mx.arange(DIM) % 16 == 7, 30.0, 0.0)
    return keys + 0.5 * keys @ mx.eye(DIM, k=1)


def transform_of(keys: mx.array, queries: mx.array | None = None, *, centred: bool = True):
    """The transform that the moments of keys and queries say."""
    found = np.array(keys, np.float64).swapaxes(0, 1).reshape(HEADS, -1, DIM)
    moment = found.swapaxes(1, 2) @ found / found.shape[1]
    asked = None
    if queries is not None:
        each = np.array(queries, np.float64).swapaxes(0, 1).reshape(HEADS, -1, DIM)
        asked = each.swapaxes(1, 2) @ each / each.shape[1]
    return KeyTransform(*fitted(found.mean(axis=1), moment, asked, centred=centred))


def formats(bits: int = 4, size: int = 32, *, transform: KeyTransform | None) -> LayerFormat:
    keys = Affine(bits, size)
    if transform is not None:
        keys = Affine(bits, size, transformed=True).with_transform(transform)
    return LayerFormat(keys, Affine(8, size))


@given(tokens=st.integers(2, 60), seed=st.integers(0, 99), size=st.sampled_from([32, 64]))
@settings(max_examples=20, deadline=None)
def test_what_is_done_to_keys_is_undone(tokens, seed, size):
    keys = keys_of(tokens, rows=2, seed=seed)
    transform = Affine(4, size, transformed=True).with_transform(transform_of(keys)).transform
    assert transform is not None
    assert transform.group_size == size
    assert mx.allclose(transform.undo(transform.apply(keys)), keys, rtol=1e-3, atol=1e-2)


def test_attention_does_not_see_it():
    keys, values = keys_of(40, rows=2), mx.random.normal((2, HEADS, 40, DIM))
    queries = mx.random.normal((2, 3 * HEADS, 5, DIM)) / 10
    transform, call = transform_of(keys_of(500)), {"scale": DIM**-0.5, "mask": "causal"}
    plain = mx.fast.scaled_dot_product_attention(queries, keys, values, **call)
    found = mx.fast.scaled_dot_product_attention(
        transform.queries(queries), transform.apply(keys), values, **call
    )
    assert mx.allclose(found, plain, atol=1e-3)


def test_scores_lose_less_than_with_any_other_four_bits():
    keys, queries = keys_of(600), mx.random.normal((1, 2 * HEADS, 50, DIM))
    queries = queries * mx.where(mx.arange(DIM) < 8, 5.0, 0.2) + 1.0
    transform = transform_of(keys_of(600, seed=1), queries)
    grouped = mx.unflatten(queries, 1, (HEADS, -1)).flatten(2, 3)
    exact, errors = grouped @ keys.swapaxes(-1, -2), {}
    for name, format in {
        "plain": Affine(4, 64),
        "rotated": Affine(4, 64, rotated=True),
        "transformed": Affine(4, 64, transformed=True).with_transform(transform),
    }.items():
        found = grouped @ kv.Packed(format.pack(keys), format).plain().swapaxes(-1, -2)
        off = found - exact  # softmax does not see what moves all scores of a query
        errors[name] = float(mx.square(off - off.mean(axis=-1, keepdims=True)).mean())
    assert errors["transformed"] < min(errors["plain"], errors["rotated"]) / 10


@pytest.mark.parametrize("pruned", ["keys", "queries"])
def test_pruned_heads_stay_exact(pruned):
    """A head whose keys are all equal, or which nothing asks, has no directions to prefer."""
    keys, queries = keys_of(60), mx.random.normal((1, HEADS, 60, DIM))
    alive = mx.arange(HEADS)[:, None, None] > 0
    if pruned == "keys":
        keys = mx.where(alive, keys, 3.0)
    else:
        queries = mx.where(alive, queries, 0.0)
    transform = transform_of(keys, queries)
    assert mx.allclose(transform.undo(transform.apply(keys)), keys, rtol=1e-3, atol=1e-2)
    transform_file.restored(transform_file.stored(transform), "here")


@pytest.mark.parametrize("length", [1, 40])
def test_the_direction_that_matters_most_is_kept(length):
    """The mean of each group of a transformed key is exact, for one token and for a prompt."""
    keys = keys_of(length, seed=4)
    format = Affine(3, 32, transformed=True).with_transform(transform_of(keys_of(500)))
    turned, stored = format.turn(keys), format.unpack(format.pack(keys), mx.float32)
    means = [mx.unflatten(each, -1, (-1, 32)).mean(axis=-1) for each in (turned, stored)]
    assert mx.allclose(means[0], means[1], atol=1e-4)


def test_every_way_to_attend_gives_the_same():
    keys, values = keys_of(40, rows=2), mx.random.normal((2, HEADS, 40, DIM))
    queries = mx.random.normal((2, 3 * HEADS, 5, DIM)) / 10
    cache = PackedKVCache(stock.KVCache(), formats(transform=transform_of(keys_of(500))))
    packed = cache.update_and_fetch(keys, values)
    plain = [side.plain() for side in packed]
    expected = mx.fast.scaled_dot_product_attention(queries, *plain, scale=0.1)
    for name in ("cpu", "metal", "cuda"):
        found = attend(queries, *packed, scale=0.1, platform=kv.Platform(name, None))
        assert mx.allclose(found, expected, atol=1e-3), name


@pytest.mark.skipif(not BATCHED, reason="mlx-lm before 0.32 keeps its own caches")
@given(lengths=st.lists(st.integers(1, 40), min_size=2, max_size=4))
@settings(max_examples=10, deadline=None)
def test_rows_of_a_batch_hold_what_they_would_alone(lengths):
    shared, caches = formats(transform=transform_of(keys_of(500))), []
    for index, length in enumerate(lengths):
        keys = keys_of(length, seed=index)
        caches.append(PackedKVCache(stock.KVCache(), shared))
        caches[-1].update_and_fetch(keys, keys)
    batch = caches[0].merge(caches)
    new = keys_of(1, rows=len(lengths), seed=9)
    batch.update_and_fetch(new, new)
    for index, cache in enumerate(caches):
        cache.update_and_fetch(new[index : index + 1], new[index : index + 1])
        row = batch.extract(index)
        assert row.formats == cache.formats
        assert mx.allclose(row.keys_and_values()[0].plain(), cache.keys_and_values()[0].plain())


def test_copies_of_a_cache_share_it():
    cache = PackedKVCache(stock.KVCache(), formats(transform=transform_of(keys_of(50))))
    cache.update_and_fetch(keys_of(4), keys_of(4))
    again: Any = copy.deepcopy(cache)
    assert again.formats.keys.transform is cast(Any, cache.formats.keys).transform
    assert again.planes[0] is not cache.planes[0]


def test_a_saved_cache_has_it():
    cache = PackedKVCache(stock.KVCache(), formats(transform=transform_of(keys_of(500))))
    cache.update_and_fetch(keys_of(40), keys_of(40))
    again, new = PackedKVCache.from_state(*saved(cache)), keys_of(1, seed=3)
    assert again.formats == cache.formats
    packed = [each.update_and_fetch(new, new)[0] for each in (again, cache)]
    assert mx.array_equal(packed[0].plain(), packed[1].plain())


DAMAGE = {
    "one array": (lambda arrays: arrays[:1], "lacks the transform"),
    "other heads": (lambda arrays: [a[:1] for a in arrays], "for other keys"),
    "shapes": (lambda arrays: [arrays[0], arrays[1][:, :, :3]], "not \\(heads, 1, dim\\)"),
    "not finite": (lambda arrays: [arrays[0] * np.nan, arrays[1]], "not finite"),
    "no inverse": (lambda arrays: [arrays[0], arrays[1] * 0], "no inverse"),
    "too large": (lambda arrays: [arrays[0], arrays[1] * 1e30], "stretches keys"),
    "too small": (lambda arrays: [arrays[0], arrays[1] * 1e-30], "stretches keys"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_one_is_refused(name):
    damage, message = DAMAGE[name]
    cache = PackedKVCache(stock.KVCache(), formats(transform=transform_of(keys_of(500))))
    cache.update_and_fetch(keys_of(40), keys_of(40))
    parts = saved(cache)
    states = parts[0] if len(parts) > 1 else parts[0][0]
    states[-1] = damage(states[-1])
    with pytest.raises(InputError, match=message):
        PackedKVCache.from_state(*parts)


def test_a_plan_reads_its_transforms_from_the_file_beside_it(tmp_path):
    transform = transform_of(keys_of(500))
    plan = tmp_path / "kv_config.json"
    plan.write_text('[{"layer_idx": 1, "k_bits": 4, "k_transformed": true, "v_bits": 4}]')
    assert kv.read_plan(plan).layers[1].keys == Affine(4, 64, transformed=True)
    transform_file.write(tmp_path / transform_file.FILE, {1: transform})
    keys = kv.read_plan(plan).layers[1].keys
    assert isinstance(keys, Affine)
    assert keys.transform == transform
    transform_file.write(tmp_path / transform_file.FILE, {0: transform})
    with pytest.raises(InputError, match="lacks the transform of layer 1"):
        kv.read_plan(plan)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('"bits": 4, "transformed": true', "values cannot be transformed"),
        ('"bits": 4, "k_transformed": 1', "transformed 1 is not true or false"),
        ('"bits": 4, "k_transformed": true, "k_rotated": true', "exclude each other"),
    ],
)
def test_entries_that_make_no_sense(entry, message, tmp_path):
    plan = tmp_path / "kv_config.json"
    plan.write_text(f'[{{"layer_idx": 1, {entry}}}]')
    with pytest.raises(InputError, match=message):
        kv.read_plan(plan)


def test_mounting_fits_what_a_plan_does_not_say(capsys):
    model, plan = build("qwen3"), kv.parse_spec("4")
    assert plan is not None
    first, again = kv.mount(model, plan), kv.mount(model, plan)
    assert "fitting the transforms of keys to 2,048 random tokens" in capsys.readouterr().err
    for slot, found in first.formats.items():
        assert isinstance(found.keys, Affine)
        assert found.keys.transform is not None
        assert found.keys.transform.centred
        assert found == again.formats[slot]  # the same model gives the same transform
    assert pickle.loads(pickle.dumps(first.formats)) == first.formats


def test_a_transform_of_another_model_is_refused():
    model, other = build("qwen3"), transform_of(keys_of(500))
    plan = kv.KVPlan("plan.json", {0: formats(transform=other)})
    with pytest.raises(InputError, match=r"plan.json: the transform of layer 0 is for 2 heads"):
        kv.mount(model, plan)


def test_keys_beside_attention_sinks_are_not_centred():
    model, plan = build("gpt_oss"), kv.parse_spec("4g32")
    assert plan is not None
    mounted = kv.mount(model, plan)
    for found in mounted.formats.values():
        assert isinstance(found.keys, Affine)
        assert found.keys.transform is not None
        assert not found.keys.transform.centred
    keys = keys_of(20)
    cache = PackedKVCache(stock.KVCache(), formats(transform=transform_of(keys)))
    packed = cache.update_and_fetch(keys, keys)
    queries, sinks = mx.random.normal((1, 4, 1, DIM)), mx.zeros((4,))
    with pytest.raises(UnsupportedError, match="without attention sinks"):
        attend(queries, *packed, scale=0.1, sinks=sinks)


def test_sequences_end_where_the_context_does():
    """Learned positions have no row behind the last one."""
    model, plan = build("gpt2"), kv.parse_spec("4g32")
    assert plan is not None
    reach = context(model)
    assert reach is not None
    assert reach < 512
    for found in kv.mount(model, plan).formats.values():
        assert isinstance(found.keys, Affine)
        assert found.keys.transform is not None


@pytest.mark.parametrize("kind", [dict, SimpleNamespace])
def test_the_context_of_a_model_with_a_text_config(kind):
    model = build("qwen3")
    model.args = SimpleNamespace(text_config=kind(max_position_embeddings=777))
    assert context(model) == 777


def test_positions_are_spread_over_the_context():
    """A transform fitted at the beginning only says nothing of keys that RoPE turned further."""
    model, plan = build("qwen3"), kv.parse_spec("4")
    assert plan is not None
    model.args.max_position_embeddings = 4096
    mounted = kv.mount(model, plan)
    plain = kv.Mounted(
        {s: LayerFormat(Affine(4, transformed=True), None) for s in mounted.formats},
        mounted.owners,
        dense=False,
        mergeable=False,
    )
    tokens = np.arange(64, dtype=np.int32)[None] % 50
    alone = transforms(model, plain, tokens)
    spread = transforms(model, plain, np.repeat(tokens, 4, axis=0))
    assert all(alone[slot] != spread[slot] for slot in alone)
