"""A packed cache does with packed rows just what mlx-lm's own cache does with plain ones."""

import copy
import itertools
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import cache as stock

from mlx_optiq_ext.kv import LayerFormat, Packed, PackedKVCache, Platform
from mlx_optiq_ext.kv.formats import Affine, Format, TurboQuant

HEADS, DIM = 2, 64
KEYS, VALUES = Affine(4, 32), Affine(3, 64, rotated=True)
TURBO = TurboQuant(4), TurboQuant(2, seed=5)
BATCHED = hasattr(stock.KVCache, "keys_and_values")  # mlx-lm 0.32 keeps the caches it is given

KINDS = {
    "plain": lambda: stock.KVCache(),
    "sliding": lambda: stock.RotatingKVCache(max_size=8),
    "sliding with kept tokens": lambda: stock.RotatingKVCache(max_size=8, keep=2),
    "chunked": lambda: stock.ChunkedKVCache(8),
    "concatenated": lambda: stock.ConcatenateKVCache(),
}

if not BATCHED:
    del KINDS["chunked"]  # before mlx-lm 0.32 it loses track after its front was dropped


EQUAL = Affine(4, 32), Affine(4, 32, rotated=True)


def refuse(**_: Any) -> Any:
    raise AssertionError("float32 is packed without a kernel")


#: How a cache is asked to hold the parts of its formats.
LAYOUTS: dict[str, dict[str, Any]] = {
    "interleaved": {"interleaved": True},
    "stacked": {"stacked": True, "platform": Platform("cuda", refuse)},
    "apart": {"interleaved": False},
}


def fake(array: mx.array, format: Format | None) -> mx.array:
    """What packing and unpacking leave of an array."""
    if format is None:
        return array
    return Packed(format.pack(array), format).plain()


def packed_cache(cache: Any, formats: tuple = (KEYS, VALUES), **options: Any) -> PackedKVCache:
    return PackedKVCache(cache, LayerFormat(*formats), **options)


class Pair:
    """A packed cache, and mlx-lm's own that is fed what packing leaves of the same rows."""

    def __init__(
        self,
        kind: str,
        seed: int = 0,
        formats: tuple = (KEYS, VALUES),
        **options: Any,
    ):
        if options.get("stacked"):
            formats = EQUAL
        self.formats = formats
        self.packed = packed_cache(KINDS[kind](), formats, dense=True, **options)
        self.plain = KINDS[kind]()
        self.key = mx.random.key(seed)

    def append(self, tokens: int, rows: int = 1) -> None:
        self.key, one, two = mx.random.split(self.key, 3)
        keys = mx.random.normal((rows, HEADS, tokens, DIM), key=one)
        values = mx.random.normal((rows, HEADS, tokens, DIM), key=two)
        found = self.packed.update_and_fetch(keys, values)
        expected = self.plain.update_and_fetch(
            *(fake(a, f) for a, f in zip((keys, values), self.formats, strict=True))
        )
        for a, b in zip(found, expected, strict=True):
            # What a batch left empty is unpacked from zeros, and may be anything in mlx-lm's.
            assert a.shape == b.shape
            assert mx.allclose(a, b, atol=1e-5)

    def same_mask(self, tokens: int, **options) -> None:
        if not hasattr(self.plain, "make_mask"):
            return
        options = {"return_array": True, "window_size": None, **options}
        found = self.packed.make_mask(tokens, **options)
        expected = self.plain.make_mask(tokens, **options)
        assert (found is None) == (expected is None)
        assert expected is None or mx.array_equal(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=25)
@given(steps=st.lists(st.integers(-3, 12), min_size=1, max_size=8))
def test_appending_and_trimming(kind, layout, steps):
    pair = Pair(kind, **LAYOUTS[layout])
    assert pair.packed.layout == layout
    for step in steps:
        if step > 0:
            if kind != "chunked":
                pair.same_mask(step)
            else:
                pair.packed.maybe_trim_front()
                pair.plain.maybe_trim_front()
            pair.append(step)
        elif step < 0 and not pair.packed.empty() and pair.plain.is_trimmable():
            assert pair.packed.is_trimmable()
            assert pair.packed.trim(-step) == pair.plain.trim(-step)
        assert pair.packed.offset == pair.plain.offset
        assert pair.packed.size() == pair.plain.size()


@pytest.mark.skipif(not BATCHED, reason="mlx-lm before 0.32 rebuilds the caches of a batch")
@pytest.mark.parametrize("steps", [(40,), (16, 16, 8)])
def test_short_prompts_padded_to_long_ones_are_packed_as_alone(steps):
    lengths = [40, 1, 3, 9, 18]  # of the last, two tokens come in a step of their own
    keys = mx.random.normal((len(lengths), HEADS, 40, DIM), key=mx.random.key(3))
    empty = [packed_cache(stock.KVCache()) for _ in lengths]
    batch = empty[0].merge(empty)
    batch.prepare(lengths=lengths, right_padding=[40 - length for length in lengths])
    alone = [packed_cache(stock.KVCache()) for _ in lengths]
    start = 0
    for step in steps:
        part = keys[:, :, start : start + step]
        batch.update_and_fetch(part, part)
        for row, (cache, length) in enumerate(zip(alone, lengths, strict=True)):
            own = part[row : row + 1, :, : max(length - start, 0)]
            if own.size:
                cache.update_and_fetch(own, own)
        start += step
    batch.finalize()
    new = keys[:, :, 5:6]
    batch.update_and_fetch(new, new)  # is no part of the prompt
    for row, cache in enumerate(alone):
        cache.update_and_fetch(new[row : row + 1], new[row : row + 1])
        found, expected = batch.extract(row).keys_and_values(), cache.keys_and_values()
        for side, wanted in zip(found, expected, strict=True):
            assert mx.array_equal(side.plain(), wanted.plain()), row


@pytest.mark.skipif(not BATCHED, reason="mlx-lm before 0.32 rebuilds the caches of a batch")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["plain", "sliding"])
@settings(deadline=None, max_examples=20)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=2, max_size=4),
    data=st.data(),
)
def test_batches(kind, layout, lengths, data):
    pairs = [Pair(kind, seed, **LAYOUTS[layout]) for seed in range(len(lengths))]
    for pair, length in zip(pairs, lengths, strict=True):
        if length:
            pair.append(length)
    batch = Pair(kind, **LAYOUTS[layout])
    batch.packed = pairs[0].packed.merge([p.packed for p in pairs])
    batch.plain = pairs[0].plain.merge([p.plain for p in pairs])
    rows = len(lengths)
    for _ in range(data.draw(st.integers(1, 5))):
        action = data.draw(st.sampled_from(["decode", "prompt", "filter", "extend", "extract"]))
        if action == "decode":
            batch.same_mask(1)
            batch.append(1, rows)
        elif action == "prompt":
            ragged = data.draw(st.lists(st.integers(1, 5), min_size=rows, max_size=rows))
            padding = [max(ragged) - n for n in ragged]
            if max(padding):
                for cache in (batch.packed, batch.plain):
                    cache.prepare(lengths=ragged, right_padding=padding)
            batch.append(max(ragged), rows)
            if max(padding):
                for cache in (batch.packed, batch.plain):
                    cache.finalize()
        elif action == "filter" and rows > 1:
            keep = sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1)))
            for cache in (batch.packed, batch.plain):
                cache.filter(keep)
            rows = len(keep)
        elif action == "extend":
            others = [Pair(kind, 77, **LAYOUTS[layout]) for _ in range(2)]
            for other in others:
                other.append(3)
            for name in ("packed", "plain"):
                more = [getattr(other, name) for other in others]
                getattr(batch, name).extend(more[0].merge(more))
            rows += 2
        elif action == "extract" and not batch.packed.empty():
            row = data.draw(st.integers(0, rows - 1))
            one, other = batch.packed.extract(row), batch.plain.extract(row)
            assert type(one.planes[0]) is type(other)
            for a, b in zip(one.keys_and_values(), other.keys_and_values(), strict=True):
                assert mx.allclose(a, b, atol=1e-5)
    assert mx.array_equal(batch.packed.offset, batch.plain.offset)
    assert mx.array_equal(batch.packed.left_padding, batch.plain.left_padding)


@pytest.mark.parametrize("formats", [(KEYS, VALUES), TURBO, (TURBO[0], VALUES)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "sliding"])
@pytest.mark.skipif(not BATCHED, reason="mlx-lm before 0.32 rebuilds the caches of a batch")
def test_a_batch_of_every_format(kind, formats):
    pairs = [Pair(kind, seed, formats) for seed in range(3)]
    for pair, length in zip(pairs, (5, 0, 11), strict=True):
        if length:
            pair.append(length)
    batch = Pair(kind, 9, formats)
    batch.packed = pairs[0].packed.merge([p.packed for p in pairs])
    batch.plain = pairs[0].plain.merge([p.plain for p in pairs])
    batch.append(1, 3)
    for cache in (batch.packed, batch.plain):
        cache.filter([0, 2])
    batch.append(1, 2)
    batch.same_mask(1)
    one, other = batch.packed.extract(1), batch.plain.extract(1)
    for a, b in zip(one.keys_and_values(), other.keys_and_values(), strict=True):
        assert mx.allclose(a, b, atol=1e-5)


SIDES = [(KEYS, VALUES), (KEYS, None), (None, VALUES)]


@pytest.mark.parametrize(
    ("sides", "interleaved"), [*itertools.product(SIDES, [True, False]), (TURBO, False)]
)
def test_bytes_are_those_of_the_plan(sides, interleaved):
    cache = packed_cache(stock.KVCache(), sides, interleaved=interleaved)
    rows = mx.random.normal((1, HEADS, 256, DIM)).astype(mx.bfloat16)
    cache.update_and_fetch(rows, rows)
    fitted = [side and side.fitted(DIM) for side in sides]
    bits = sum(16 if side is None else side.bits_per_element for side in fitted)
    assert cache.nbytes == rows.size * bits / 8


SAVED = {
    "affine": (KEYS, VALUES),
    "turboquant": TURBO,
    "both": (TURBO[0], VALUES),
    "values only": (None, VALUES),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("formats", SAVED.values(), ids=list(SAVED))
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind, formats, layout, tmp_path, monkeypatch):
    monkeypatch.setattr(stock, "PackedKVCache", PackedKVCache, raising=False)
    pair = Pair(kind, formats=formats, **LAYOUTS[layout])
    for tokens in (5, 6, 1):
        pair.append(tokens)
    stock.save_prompt_cache(str(tmp_path / "cache.safetensors"), [pair.packed])
    loaded: Any = stock.load_prompt_cache(str(tmp_path / "cache.safetensors"))[0]
    assert loaded.formats == LayerFormat(*pair.formats).fitted(DIM, DIM)
    assert loaded.layout == pair.packed.layout
    pair.packed = loaded
    pair.append(1)
    pair.append(3)


def test_a_copy_is_apart():
    pair = Pair("plain")
    pair.append(5)
    other = copy.deepcopy(pair.packed)
    pair.append(4)
    assert (other.offset, pair.packed.offset) == (5, 9)


def test_mlx_lm_sees_no_cache_that_it_could_quantize_or_merge_itself():
    cache = packed_cache(stock.KVCache(), mergeable=False)
    assert not hasattr(cache, "bits")  # its own attention would take it for QuantizedKVCache
    assert not hasattr(cache, "to_quantized")
    assert not hasattr(cache, "merge")
    assert not hasattr(packed_cache(stock.ChunkedKVCache(8)), "merge")
    assert packed_cache(stock.KVCache()).empty()
    assert mlx_lm.__version__
