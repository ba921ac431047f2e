"""What follows a stored prompt follows it as if it had been computed: its last tokens are exact."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import cache as stock

from mlx_optiq_ext import kv, prompts
from mlx_optiq_ext.prompts import splitting

from .conftest import BLOCK, Toy, stored, tiered, toy

TOKENS = [(7 * i) % 29 for i in range(46)]
SPEC = "4g32"


def run(own: Toy, caches: list[Any], tokens: list[int]) -> mx.array:
    logits = own.model(mx.array([tokens]), cache=caches)
    mx.eval(logits, [cache.state for cache in caches])
    return logits


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("parts", [[40], [7, 20, 12, 1]])
def test_a_resumed_prompt_gives_the_logits_of_one_computed_anew(family, parts, tmp_path):
    own, at, start = toy(family, SPEC), stored(tmp_path), 0
    caches = own.space.make()
    for count in parts:
        run(own, caches, TOKENS[start : start + count])
        start += count
    at.keep(own.space, TOKENS[:start], caches)
    assert at.writer.flush()
    found = stored(tmp_path).find(own.space, TOKENS)
    assert found is not None
    again, length = found
    assert length == start == 40
    for tokens in (TOKENS[40:44], TOKENS[44:45], TOKENS[45:]):
        assert mx.array_equal(run(own, again, tokens), run(own, caches, tokens))
    assert all(splitting.rewind(each, len(TOKENS)) == len(TOKENS) for each in (caches, again))


def test_a_prompt_in_memory_goes_on_elsewhere_from_the_end_of_a_block(tmp_path):
    own = toy("qwen3", SPEC)
    cache = tiered(own, stored(tmp_path))
    own.answer(TOKENS, 2, cache)
    other = [*TOKENS[:30], 1, 2, 3]
    before, expected = own.seen, own.answer(other, 6)
    own.seen = before
    caches, rest = cache.fetch_nearest_cache("m", other)
    assert len(other) - len(rest) == 30 // BLOCK * BLOCK
    whole = own.space.make()
    run(own, whole, other[: -len(rest)])
    assert mx.allclose(run(own, caches, rest), run(own, whole, rest), atol=1e-4)
    assert own.answer(other, 6, cache) == expected


def test_a_prompt_that_shares_less_than_a_block_is_computed(tmp_path):
    own = toy("qwen3", SPEC)
    cache = tiered(own, stored(tmp_path))
    own.answer(TOKENS, 2, cache)
    caches, rest = cache.fetch_nearest_cache("m", [*TOKENS[:3], 1, 2])
    assert len(rest) == 5
    assert all(each.empty() for each in caches)


def test_what_was_unpacked_again_is_not_stored(tmp_path):
    own, at = toy("qwen3", SPEC), stored(tmp_path)
    caches = own.space.make()
    run(own, caches, TOKENS[:22])
    for each in caches:
        each.trim(3)
    run(own, caches, TOKENS[19:40])
    at.keep(own.space, TOKENS[:40], caches)
    assert at.writer.flush()
    found = stored(tmp_path).find(own.space, TOKENS)
    assert found is not None
    assert found[1] == 16


def test_rows_of_a_batch_keep_their_own_ends(tmp_path):
    own, at = toy("qwen3", SPEC), stored(tmp_path)
    asked = [TOKENS, TOKENS[5:21], TOKENS[2:37]]
    cache = tiered(own, at)
    own.answers(asked, 9, cache)
    assert at.writer.flush()
    for tokens in asked:
        found = stored(tmp_path).find(own.space, [*tokens, 1])
        assert found is not None
        assert found[1] == len(tokens)
        alone = own.space.make()
        run(own, alone, tokens[: found[1]])
        for one, other in zip(found[0], alone, strict=True):
            for side, wanted in zip(one.last.sides, other.last.sides, strict=True):
                assert np.allclose(side, wanted, atol=1e-5)


def test_blocks_take_three_percent_more_than_what_is_in_them(tmp_path):
    formats = kv.parse_spec("4p")
    assert formats is not None
    assert formats.everywhere is not None
    layer = kv.LayerFormat(formats.everywhere.keys, formats.everywhere.values, recent_tokens=4)

    def make() -> list[Any]:
        return [kv.PackedKVCache(stock.KVCache(), layer) for _ in range(4)]

    space = prompts.space_of(make, "none")
    caches, at = space.make(), prompts.StoredPrompts(prompts.BlockStore.open(tmp_path, 10**9))
    for cache in caches:
        cache.update_and_fetch(*mx.random.normal((2, 1, 4, 512, 64)).astype(mx.bfloat16))
    at.keep(space, [1] * 512, caches)
    assert at.writer.flush()
    taken = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    last = 2 * 2 * 4 * 4 * 64 * 2  # blocks, sides, heads, tokens, elements, bytes
    packed = 2 * 4 * 512 * 64 * 4.5 / 8
    assert 4 * (packed + last) < taken < 1.03 * 4 * (packed + last)
    assert sum(cache.nbytes for cache in caches) == 4 * (packed + 1.5 * last)
