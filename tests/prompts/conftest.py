"""Toy models, and the server's use of a prompt cache without a server."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import toy_models
from mlx_lm.models.cache import make_prompt_cache

from mlx_optiq_ext import kv, prompts
from mlx_optiq_ext.prompts.splitting import leaves, planes

#: Full attention, linear attention beside it, and sliding windows.
FAMILIES = ("qwen3", "qwen3_5", "gemma3_text")


@dataclass
class Toy:
    """A toy model and what the server knows of it."""

    model: Any
    name: str
    seen: list[int] = field(default_factory=list)

    def make(self) -> list[Any]:
        return make_prompt_cache(self.model)

    @property
    def space(self) -> prompts.Space:
        return prompts.space_of(self.make, self.name)

    def answer(self, tokens: list[int], count: int, cache: Any = None) -> list[int]:
        """Greedy tokens; with a cache as the server uses it. `seen` counts the tokens computed."""
        caches, rest = (
            cache.fetch_nearest_cache("m", tokens) if cache is not None else (None, tokens)
        )
        caches = self.make() if caches is None else caches
        self.seen.append(len(rest))
        # One token at a time: products of several rows round differently, and so may codes.
        found: list[int] = []
        steps = list(rest)
        while steps:
            logits = self.model(mx.array([[steps.pop(0)]]), cache=caches)[0, -1]
            mx.eval(logits)
            if not steps and len(found) < count:
                best: Any = mx.argmax(logits).item()
                found.append(int(best))
                steps.append(found[-1])
        if cache is not None:
            cache.insert_cache("m", [*tokens, *found], caches)
        return found


def toy(name: str, spec: str = "16") -> Toy:
    model = toy_models.build(name)
    model.set_dtype(mx.float32)
    if spec != "16":
        kv.mount(model, kv.parse_spec(spec))  # pyright: ignore[reportArgumentType]
    return Toy(model, f"{name} {spec}")


def stored(folder: Path, block: int = 4, limit: int = 10**9) -> prompts.StoredPrompts:
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
    return found


def flat(state: Any) -> list[Any]:
    if isinstance(state, list | tuple):
        return [each for part in state for each in flat(part)]
    return [state]


@pytest.fixture(scope="session", params=[(f, s) for f in FAMILIES for s in ("16", "8g32", "4g32")])
def own(request) -> Toy:
    return toy(*request.param)
