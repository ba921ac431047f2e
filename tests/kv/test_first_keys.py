"""The first keys of each row are as exact as the model made them, wherever rows go."""

from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_shim import kernel_factory
from mlx_lm.models import cache as stock

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.kv import LayerFormat, PackedKVCache, Platform, attend, parse_spec, read_plan
from mlx_optiq_ext.kv.formats import Affine
from mlx_optiq_ext.kv.plan import entries

from .conftest import saved

HEADS, DIM = 2, 64
BATCHED = hasattr(stock.KVCache, "keys_and_values")
#: Coarse, so that a key that is not kept is far off.
FORMATS = LayerFormat(Affine(2, 64), Affine(8, 64), 3)


def keys_of(tokens: int, rows: int = 1, seed: int = 0) -> mx.array:
    return mx.random.normal((rows, HEADS, tokens, DIM), key=mx.random.key(seed))


def filled(*lengths: int, seed: int = 0) -> tuple[PackedKVCache, mx.array, Any]:
    """A cache that got so many tokens at a time, its keys, and how it holds them."""
    cache, keys = PackedKVCache(stock.KVCache(), FORMATS), keys_of(sum(lengths), seed=seed)
    start, packed = 0, None
    for length in lengths:
        part = keys[:, :, start : start + length]
        packed, _ = cache.update_and_fetch(part, part)
        start += length
    return cache, keys, packed


def check(packed: Any, keys: mx.array) -> None:
    """The first keys are exact, and the next ones are not."""
    got = packed.plain()
    count = min(FORMATS.sink_tokens, keys.shape[2])
    assert mx.allclose(got[:, :, :count], keys[:, :, :count], atol=1e-4)
    if keys.shape[2] > count:
        assert not mx.allclose(got[:, :, count:], keys[:, :, count:], atol=0.1)


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_however_tokens_come(lengths):
    _, keys, packed = filled(*lengths)
    check(packed, keys)


@given(cut=st.integers(1, 8), more=st.integers(1, 6))
@settings(max_examples=15, deadline=None)
def test_after_tokens_were_taken_back(cut, more):
    cache, keys, _ = filled(8)
    cache.trim(cut)
    new = keys_of(more, seed=7)
    packed, _ = cache.update_and_fetch(new, new)
    check(packed, mx.concatenate([keys[:, :, : 8 - cut], new], axis=2))


@pytest.mark.skipif(not BATCHED, reason="mlx-lm before 0.32 keeps its own caches")
@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=4), data=st.data())
@settings(max_examples=20, deadline=None)
def test_in_rows_of_a_batch(lengths, data):
    """Merged, extended, filtered and extracted rows, some of which have no first keys yet."""
    rows = [filled(length, seed=seed) for seed, length in enumerate(lengths)]
    batch = rows[0][0].merge([row[0] for row in rows[:-1]])
    batch.extend(rows[-1][0].merge([rows[-1][0]]))
    order = data.draw(st.permutations(range(len(rows))))[: data.draw(st.integers(1, 4))]
    batch.filter(sorted(order))
    steps = data.draw(st.integers(1, 4))
    new = keys_of(steps, rows=len(order), seed=9)
    for step in range(steps):
        part = new[:, :, step : step + 1]
        batch.update_and_fetch(part, part)
    for place, index in enumerate(sorted(order)):
        every = mx.concatenate([rows[index][1], new[place : place + 1]], axis=2)
        check(batch.extract(place).keys_and_values()[0], every)


@pytest.mark.skipif(not BATCHED, reason="mlx-lm before 0.32 keeps its own caches")
def test_of_prompts_padded_on_the_right():
    short, long = keys_of(2), keys_of(6, seed=1)
    empty = [PackedKVCache(stock.KVCache(), FORMATS) for _ in range(2)]
    batch = empty[0].merge(empty)
    batch.prepare(lengths=[2, 6], right_padding=[4, 0])
    padded = mx.pad(short, [(0, 0), (0, 0), (0, 4), (0, 0)], constant_values=9.0)
    both = mx.concatenate([padded, long])
    batch.update_and_fetch(both, both)
    batch.finalize()
    new = keys_of(2, rows=2, seed=4)
    for step in range(2):
        batch.update_and_fetch(new[:, :, step : step + 1], new[:, :, step : step + 1])
    for index, keys in enumerate((short, long)):
        every = mx.concatenate([keys, new[index : index + 1]], axis=2)
        check(batch.extract(index).keys_and_values()[0], every)


@pytest.mark.newest
@pytest.mark.parametrize("name", ["cpu", "composed", "fused", "cuda", "metal"])
@pytest.mark.parametrize("length", [1, 3])
def test_every_way_to_attend_sees_them(name, length, tmp_path):
    rows, packs = [], []
    for index, tokens in enumerate((40, 25)):
        keys = keys_of(tokens, seed=index).astype(mx.bfloat16)
        rows.append(PackedKVCache(stock.KVCache(), FORMATS, interleaved=False))
        rows[-1].update_and_fetch(keys, keys)
    batch = rows[0].merge(rows) if BATCHED else rows[0]
    count = 2 if BATCHED else 1
    new = keys_of(length, rows=count, seed=5).astype(mx.bfloat16)
    packs = batch.update_and_fetch(new, new)
    queries = mx.random.normal((count, 3 * HEADS, length, DIM)).astype(mx.bfloat16)
    tokens = packs[0].shape[2]
    mask = None
    if BATCHED:
        columns, ends = mx.arange(tokens), mx.arange(tokens - length, tokens)
        causal = columns[None] <= ends[:, None]
        mask = mx.logical_and(causal, columns >= mx.array([0, 15])[:, None, None, None])
    compiled = kernel_factory(name, tmp_path) if name in ("cuda", "metal") else None
    platform = Platform({"composed": "metal", "fused": "cuda"}.get(name, name), compiled)
    call: Any = {"scale": 0.3, "mask": mask}
    plain = [side.plain(mx.float32) for side in packs]
    expected = mx.fast.scaled_dot_product_attention(queries.astype(mx.float32), *plain, **call)

    def error() -> float:
        return float(mx.abs(attend(queries, *packs, platform=platform, **call) - expected).max())

    kept = error()
    packs[0].first = None
    assert kept < 0.1 < 2 * error()
    assert kept < error() / 4


def test_a_saved_cache_has_them_and_goes_on():
    cache, keys, _ = filled(2)
    again = PackedKVCache.from_state(*saved(cache))
    new = keys_of(3, seed=2)
    packed, _ = again.update_and_fetch(new, new)
    check(packed, mx.concatenate([keys, new], axis=2))
    assert again.nbytes > sum(p.keys.nbytes + p.values.nbytes for p in again.planes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda arrays: [], "lacks its first keys"),
        (lambda arrays: [arrays[0][:, :1]], "of another shape"),
        (lambda arrays: [arrays[0] * float("nan")], "not finite"),
    ],
)
def test_damaged_ones_are_refused(damage, message):
    parts = saved(filled(5)[0])
    states = parts[0] if len(parts) > 1 else parts[0][0]
    states[-1] = damage(states[-1])
    with pytest.raises(InputError, match=message):
        PackedKVCache.from_state(*parts)


def test_a_sliding_window_keeps_none():
    cache = PackedKVCache(stock.RotatingKVCache(max_size=8), FORMATS)
    for seed in range(12):
        cache.update_and_fetch(keys_of(1, seed=seed), keys_of(1, seed=seed))
    assert cache.residuals is None


def test_plans_say_how_many(tmp_path):
    plan = tmp_path / "kv_config.json"
    plan.write_text('[{"layer_idx": 1, "bits": 4, "sink_tokens": 3}]')
    assert read_plan(plan).layers[1].sink_tokens == 3
    assert entries(read_plan(plan).layers)[0]["sink_tokens"] == 3
    spec = parse_spec("4")
    assert spec is not None
    assert spec.everywhere is not None
    assert spec.everywhere.sink_tokens == 1
    for entry, message in (
        ('"bits": 4, "sink_tokens": 65', "sink_tokens"),
        ('"k_bits": 16, "v_bits": 4, "sink_tokens": 1', "keys that are not quantized"),
    ):
        plan.write_text(f'[{{"layer_idx": 1, {entry}}}]')
        with pytest.raises(InputError, match=message):
            read_plan(plan)
