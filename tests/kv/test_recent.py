"""The last keys and values, which attention sees as they were computed."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import cache as stock

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.kernels import CPU
from mlx_optiq_ext.kv import PackedKVCache, parse_spec, read_plan
from mlx_optiq_ext.kv.attention import blocks, composed, fused
from mlx_optiq_ext.kv.formats import Affine
from mlx_optiq_ext.kv.plan import RECENT_TOKENS, LayerFormat, entries

from .conftest import saved

COUNT, HEADS, DIM, WINDOW = 4, 2, 32, 9
BATCHED = hasattr(stock.KVCache, "keys_and_values")
#: Coarse, so that a token that is not kept is far off.
FORMATS = LayerFormat(Affine(2, 32), Affine(2, 32), recent_tokens=COUNT)
KINDS: dict[str, Any] = {
    "plain": stock.KVCache,
    "sliding": lambda: stock.RotatingKVCache(max_size=WINDOW),
    "sliding with kept tokens": lambda: stock.RotatingKVCache(max_size=WINDOW, keep=2),
}
BACKENDS = {"blocks": blocks.attend, "composed": composed.attend, "fused": fused.attend}


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def cache_of(kind: str = "plain", formats: LayerFormat = FORMATS) -> PackedKVCache:
    return PackedKVCache(KINDS[kind](), formats, platform=CPU)


class Sequence:
    """All tokens of a row, and from which of them on exact copies were kept.

    Args:
        seed: Its tokens'.
        kind: Of its cache.
    """

    def __init__(self, seed: int, kind: str = "plain"):
        self.seed, self.kind, self.known = seed, kind, 0
        self.tokens = np.zeros((2, HEADS, 0, DIM), np.float32)

    def new(self, count: int) -> np.ndarray:
        """Keys and values, (2, heads, count, dim)."""
        self.seed += 100
        return np.array(random(2, HEADS, count, DIM, seed=self.seed))

    def add(self, new: np.ndarray) -> None:
        self.tokens = np.concatenate([self.tokens, new], axis=2)

    def trim(self, count: int) -> None:
        self.tokens = self.tokens[:, :, : self.tokens.shape[2] - count]
        self.known = self.tokens.shape[2] if count else self.known

    def expected(self, queries: np.ndarray, visible: Any = None) -> np.ndarray:
        """Attention of the last tokens' queries (query heads, length, dim).

        ``visible`` holds the tokens that each sees, if that is not a window.
        """
        total, length = self.tokens.shape[2], queries.shape[1]
        packed = np.array(_fake(mx.array(self.tokens)))
        found = np.zeros_like(queries)
        for n in range(length):
            at = total - length + n
            places = np.arange(at + 1)
            own = (places > at - COUNT) & (places >= self.known)
            keys, values = np.where(
                own[None, :, None], self.tokens[:, :, : at + 1], packed[:, :, : at + 1]
            )
            sees = np.ones(at + 1, bool)
            if self.kind != "plain":
                sees = places > at - WINDOW
            if visible is not None:
                sees = np.isin(places, visible[n])
            for head in range(len(queries)):
                scores = keys[head // 2] @ queries[head, n] * DIM**-0.5
                weights = np.exp(scores - scores.max()) * sees
                found[head, n] = weights / weights.sum() @ values[head // 2]
        return found


def _fake(array: mx.array) -> mx.array:
    format = FORMATS.keys
    assert format is not None
    return format.unpack(format.pack(array), mx.float32) if array.size else array


class Rows:
    """A cache, and the sequences that are its rows."""

    def __init__(self, cache: PackedKVCache, rows: list[Sequence], backend: str = "blocks"):
        self.cache, self.rows, self.backend = cache, rows, backend
        # mlx-lm masks kept tokens of a window in one way and another: it says where they are.
        kept = "kept" in rows[0].kind and rows[0].kind
        self.places = KINDS[kept]() if kept else None

    def visible(self, length: int, mask: mx.array | None) -> list[np.ndarray]:
        """The tokens that each new query sees."""
        cache: Any = self.places
        new = mx.arange(cache.offset, cache.offset + length).astype(mx.float32)[None, None, :, None]
        there = np.array(cache.update_and_fetch(new, new)[0])[0, 0, :, 0]
        if mask is None:
            return [there] * length
        return [there[row] for row in np.array(mx.broadcast_to(mask, (length, len(there))))]

    def append(self, *counts: int) -> None:
        """So many tokens to each row, padded on the right; checks what their queries get."""
        length = max(counts)
        if min(counts) < length:
            padding = [length - count for count in counts]
            self.cache.prepare(lengths=list(counts), right_padding=padding)
        new = [row.new(length) for row in self.rows]
        keys, values = mx.array(np.stack(new, axis=1))
        mask = self.cache.make_mask(length, return_array=length > 1, window_size=None)
        packed = self.cache.update_and_fetch(keys, values)
        visible = None if self.places is None else self.visible(length, mask)
        queries = random(len(new), 2 * HEADS, length, DIM, seed=length)
        call: Any = (queries, *packed, DIM**-0.5, mask, None)
        output = np.array(BACKENDS[self.backend](*call))
        for number, (row, count) in enumerate(zip(self.rows, counts, strict=True)):
            row.add(new[number][:, :, :count])
            wanted = row.expected(np.array(queries[number])[:, :count], visible)
            assert np.allclose(output[number, :, :count], wanted, atol=1e-4)
        if min(counts) < length:
            self.cache.finalize()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=15)
@given(steps=st.lists(st.integers(-3, 12), min_size=1, max_size=9))
def test_tokens_may_come_in_any_parts_and_be_taken_back(kind, backend, steps):
    alone = Rows(cache_of(kind), [Sequence(0, kind)], backend)
    for step in steps:
        if step > 0:
            alone.append(step)
        elif step < 0 and not alone.cache.empty() and alone.cache.is_trimmable():
            alone.rows[0].trim(alone.cache.trim(-step))
            if alone.places is not None:
                alone.places.trim(-step)
    alone.append(1)
    alone.append(1)


@pytest.mark.skipif(not BATCHED, reason="mlx-lm before 0.32 rebuilds the caches of a batch")
@pytest.mark.parametrize("kind", ["plain", "sliding"])
@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(0, 12), min_size=2, max_size=4), data=st.data())
def test_rows_of_a_batch(kind, lengths, data):
    alone = [Rows(cache_of(kind), [Sequence(n, kind)]) for n in range(len(lengths))]
    for each, length in zip(alone, lengths, strict=True):
        if length:
            each.append(length)
            if each.cache.is_trimmable() and data.draw(st.booleans()):
                each.rows[0].trim(each.cache.trim(1))
    caches = [each.cache for each in alone]
    batch = Rows(caches[0].merge(caches), [row for each in alone for row in each.rows])
    actions = ["decode", "prompt", "filter", "extend", "extract"]
    for number in range(data.draw(st.integers(1, 6))):
        rows = len(batch.rows)
        action = data.draw(st.sampled_from(actions))
        if kind == "sliding" and action in ("decode", "extend") and "prompt" in actions:
            # Behind a decoded token mlx-lm masks a window of padded prompts in another way.
            actions.remove("prompt")
        if action == "decode":
            batch.append(*[1] * rows)
        elif action == "prompt":
            batch.append(*data.draw(st.lists(st.integers(1, 5), min_size=rows, max_size=rows)))
        elif action == "filter":
            keep = sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1)))
            batch.cache.filter(keep)
            batch.rows = [batch.rows[place] for place in keep]
        elif action == "extend":
            other = Rows(cache_of(kind), [Sequence(50 + number, kind)])
            other.append(data.draw(st.integers(1, 12)))
            batch.cache.extend(other.cache.merge([other.cache]))
            batch.rows += other.rows
        else:
            place = data.draw(st.integers(0, rows - 1))
            if batch.rows[place].tokens.shape[2]:
                alone = Rows(batch.cache.extract(place), [batch.rows[place]])
                again, seed = batch.rows[place].tokens, batch.rows[place].seed
                alone.append(1)
                batch.rows[place].tokens, batch.rows[place].seed = again, seed
    batch.append(*[1] * len(batch.rows))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_cache_has_them_and_goes_on(kind):
    alone = Rows(cache_of(kind), [Sequence(0, kind)])
    alone.append(11)
    alone.append(1)
    alone.cache = PackedKVCache.from_state(*saved(alone.cache))
    alone.cache.platform = CPU
    alone.append(1)
    alone.append(3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda arrays: [], "lacks its last tokens"),
        (lambda arrays: arrays[:1], "lacks its last tokens"),
        (lambda arrays: [arrays[0], arrays[1][:, :, :1]], "of another shape"),
        (lambda arrays: [arrays[0] * float("nan"), arrays[1]], "not finite"),
    ],
)
def test_damaged_ones_are_refused(damage, message):
    alone = Rows(cache_of(), [Sequence(0)])
    alone.append(5)
    parts = saved(alone.cache)
    states = parts[0] if len(parts) > 1 else parts[0][0]
    states[-1] = damage(states[-1])
    with pytest.raises(InputError, match=message):
        PackedKVCache.from_state(*parts)


def test_a_prompt_in_memory_is_not_held_by_its_last_tokens():
    cache = cache_of()
    cache.update_and_fetch(*[random(1, HEADS, 500, DIM)] * 2)
    assert cache.last is not None
    before = mx.get_active_memory()
    mx.eval(cache.state)
    packed = sum(plane.keys.nbytes + plane.values.nbytes for plane in cache.planes)
    assert mx.get_active_memory() - before < packed + 200_000
    assert cache.nbytes == packed + 2 * HEADS * COUNT * DIM * 4


@pytest.mark.parametrize("formats", [(FORMATS.keys, None), (None, FORMATS.values)])
def test_one_side_alone(formats):
    cache = cache_of("plain", LayerFormat(*formats, recent_tokens=COUNT))
    for step in (6, 1, 1):
        keys, values = random(2, 1, HEADS, step, DIM, seed=step)
        cache.update_and_fetch(keys, values)
    again = PackedKVCache.from_state(*saved(cache))
    assert cache.last is not None
    assert again.last is not None
    for one, other, format in zip(again.last.sides, cache.last.sides, formats, strict=True):
        assert (one is None) == (other is None) == (format is None)
        if one is not None and other is not None:
            assert mx.array_equal(one, other)


def test_caches_for_models_that_attend_themselves_keep_none():
    cache = PackedKVCache(stock.KVCache(), FORMATS, dense=True)
    keys, _ = cache.update_and_fetch(*[random(1, HEADS, 6, DIM)] * 2)
    assert cache.last is None
    assert mx.allclose(keys, _fake(random(1, HEADS, 6, DIM)), atol=1e-5)


def test_plans_say_how_many(tmp_path):
    plan = tmp_path / "kv_config.json"
    for text, count in (('"recent_tokens": 7', 7), ('"recent_tokens": 0', 0), ('"k_bits": 4', 0)):
        plan.write_text(f'[{{"layer_idx": 1, "bits": 4, {text}}}]')
        found = read_plan(plan).layers
        assert found[1].recent_tokens == count
        assert entries(found)[0].get("recent_tokens", 0) == count
    for spec, count in (("4", RECENT_TOKENS), ("3", RECENT_TOKENS), ("4p", 0), ("8", 0)):
        parsed = parse_spec(spec)
        assert parsed is not None
        assert parsed.everywhere is not None
        assert parsed.everywhere.recent_tokens == count
    for count in ("65", "-1", '"4"', "true"):
        plan.write_text(f'[{{"layer_idx": 1, "bits": 4, "recent_tokens": {count}}}]')
        with pytest.raises(InputError, match="recent_tokens"):
            read_plan(plan)
