"""Toy models, and the server's use of a prompt cache without a server."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import toy_models
from live_server import write_exact
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache

from mlx_optiq_ext import kv, prompts
from mlx_optiq_ext.kv.kept.tokens import last_at
from mlx_optiq_ext.prompts.splitting import leaves, per_token, planes

#: Full attention, linear attention beside it, and sliding windows.
FAMILIES = ("qwen3", "qwen3_5", "gemma3_text")

#: Tokens of a block.
BLOCK = 4

#: Ends a message.
ENDER = 0


@dataclass
class Toy:
    """A toy model and what the server knows of it.

    Attributes:
        model: The model.
        name: In place of its digest.
        seen: Tokens of prompts that were computed.
    """

    model: Any
    name: str
    seen: int = 0

    def make(self) -> list[Any]:
        return make_prompt_cache(self.model)

    @property
    def space(self) -> prompts.Space:
        return prompts.space_of(self.make, self.name, block=BLOCK)

    def answer(self, tokens: Sequence[int], count: int, cache: Any = None) -> list[int]:
        """Greedy tokens."""
        return self.answers([tokens], count, cache)[0]

    def answers(
        self, asked: Sequence[Sequence[int]], count: int, cache: Any = None
    ) -> list[list[int]]:
        """Greedy tokens for prompts that arrive at once, computed and kept as by mlx-lm's server.

        Args:
            asked: The prompts.
            count: Tokens of an answer.
            cache: mlx-lm's cache or ours; None for none.
        """
        generator = BatchGenerator(self.model)
        found: dict[int, list[int]] = {}
        kinds: dict[int, list[str]] = {}
        for tokens in asked:
            caches, rest = (
                (None, tokens) if cache is None else cache.fetch_nearest_cache("m", tokens)
            )
            segments, own = [list(tokens)], ["user"]
            if isinstance(cache, prompts.TieredPromptCache) and prompts.has_snapshots(self.make()):
                segments, own = prompts.divided(segments, own, [ENDER])
            known = skipped = len(tokens) - len(rest)
            while skipped >= len(segments[0]):
                skipped -= len(segments.pop(0))
                own.pop(0)
            segments[0] = segments[0][skipped:]
            (uid,) = generator.insert_segments(
                segments=[segments],
                max_tokens=[count],
                caches=[self.make() if caches is None else caches],
                all_tokens=[list(tokens[:known])],
            )
            found[uid], kinds[uid] = [], own[::-1]
            self.seen += len(rest)
        left = set(found)
        while left:
            computed, generated = generator.next()
            ends = [each.uid for each in computed if each.end_of_segment and not each.end_of_prompt]
            ends = [uid for uid in ends if kinds[uid]]
            for uid, (caches, tokens) in generator.extract_cache(ends).items():
                kind = kinds[uid].pop()
                if cache is not None:
                    cache.insert_cache("m", tokens[:], caches, cache_type=kind)
            for each in generated:
                found[each.uid].append(each.token)
                if each.finish_reason is not None:
                    left.remove(each.uid)
                    if cache is not None:
                        done: tuple[Any, Any] = (each.all_tokens, each.prompt_cache)
                        cache.insert_cache("m", list(done[0]), done[1])
        return list(found.values())


def toy(name: str, spec: str = "16") -> Toy:
    model = toy_models.build(name)
    model.set_dtype(mx.float32)
    if spec != "16":
        kv.mount(model, kv.parse_spec(spec))  # pyright: ignore[reportArgumentType]
    return Toy(model, f"{name} {spec}")


def stored(folder: Path, block: int = BLOCK, limit: int = 10**9) -> prompts.StoredPrompts:
    return prompts.StoredPrompts(prompts.BlockStore.open(folder, limit), block=block)


def tiered(own: Toy, at: prompts.StoredPrompts) -> prompts.TieredPromptCache:
    from mlx_lm.models.cache import LRUPromptCache

    return prompts.TieredPromptCache(LRUPromptCache(), at, lambda key: own.space)


def states(caches: list[Any], length: int) -> list[Any]:
    """All arrays and numbers of the first tokens."""
    found = []
    for plane in (plane for cache in leaves(caches) for plane in planes(cache)):
        if type(plane).__name__ == "KVCache" and not plane.empty():
            found += [plane.keys[:, :, :length], plane.values[:, :, :length]]
        elif not plane.empty():
            found += flat(plane.state)
    for cache in leaves(caches):
        known = per_token(cache) or getattr(cache, "offset", None) == length
        if isinstance(cache, kv.PackedKVCache) and known:
            found += last_of(cache, length)
    return found


def last_of(cache: kv.PackedKVCache, length: int) -> list[mx.array]:
    """The last of a cache's first tokens, as they were computed."""
    last = last_at(cache, length)
    assert last is not None
    return last.arrays


def flat(state: Any) -> list[Any]:
    if isinstance(state, list | tuple):
        return [each for part in state for each in flat(part)]
    return [state]


@pytest.fixture(scope="session", params=[(f, s) for f in FAMILIES for s in ("16", "8g32", "4g32")])
def own(request) -> Toy:
    return toy(*request.param)


@pytest.fixture(scope="session")
def exact(tiny, tmp_path_factory) -> Path:
    return write_exact(tiny, tmp_path_factory.mktemp("models") / "exact")
