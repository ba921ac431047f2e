"""Prompt caches kept apart by adapter: keys and values depend on its weights."""

from typing import Any

from .mixture import Mixture, MountedAdapter, signature


class SignedCache(list):
    """The caches of one row, with the adapter or sum of adapters that made them.

    Attributes:
        adapter: What made them; None for the base model.
    """

    adapter: MountedAdapter | Mixture | None = None


def signed(caches: list[Any], adapter: MountedAdapter | Mixture | None) -> SignedCache:
    """A row's caches with its adapter or sum of adapters."""
    result = SignedCache(caches)
    result.adapter = adapter
    return result


class AdapterPromptCache:
    """mlx-lm's ``LRUPromptCache`` with adapters in its keys: their names, versions and scales.

    A new version of an adapter does not find the entries of an old one; they age out of the LRU.

    Args:
        cache: An ``LRUPromptCache``.
        current: Gives what the request that is being served selects.
    """

    def __init__(self, cache: Any, current: Any):
        self._cache = cache
        self._current = current

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def __len__(self) -> int:
        return len(self._cache)

    def fetch_nearest_cache(self, model: Any, tokens: Any) -> Any:
        """Like mlx-lm's, for the adapter of the current request."""
        return self._cache.fetch_nearest_cache(_key(model, self._current()), tokens)

    def insert_cache(self, model: Any, tokens: Any, prompt_cache: Any, **kwargs: Any) -> Any:
        """Like mlx-lm's, for the adapter that made the cache."""
        if isinstance(prompt_cache, SignedCache):
            adapter, prompt_cache = prompt_cache.adapter, list(prompt_cache)
        else:
            adapter = self._current()
        return self._cache.insert_cache(_key(model, adapter), tokens, prompt_cache, **kwargs)


def _key(model: Any, adapter: MountedAdapter | Mixture | None) -> Any:
    return model if adapter is None else (model, signature(adapter))
