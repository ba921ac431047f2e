"""The prompt cache of a server: mlx-lm's own in memory, and a store behind it."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from .reuse import StoredPrompts
from .space import Space
from .splitting import align, covered, exact, has_snapshots

_log = logging.getLogger(__name__)


class TieredPromptCache:
    """mlx-lm's ``LRUPromptCache`` with a store behind it.

    Args:
        memory: An ``LRUPromptCache``.
        stored: The store.
        space: The space of a key of ``memory``: which model, and which adapter.
    """

    def __init__(self, memory: Any, stored: StoredPrompts, space: Callable[[Any], Space]):
        self._memory = memory
        self._stored = stored
        self._space = space

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def __len__(self) -> int:
        return len(self._memory)

    def fetch_nearest_cache(self, model: Any, tokens: Sequence[int]) -> Any:
        """Like mlx-lm's, from memory or from disk; at least one token is left to compute."""
        tokens = list(tokens)
        caches, rest = self._memory.fetch_nearest_cache(model, tokens)
        if caches is not None and not rest:
            # mlx-lm cannot go on without a token.
            caches, rest = self._memory.fetch_nearest_cache(model, tokens[:-1])
            rest = [*rest, tokens[-1]]
        known = len(tokens) - len(rest)
        found, memory, disk = self._stored.find(self._space(model), tokens, known), known, 0
        if found is not None:
            caches, known = found
            memory, disk, rest = 0, known, tokens[known:]
        _log.info(
            "[optiq] prompt of %d tokens: %d from memory, %d from disk, %d computed",
            *(len(tokens), memory, disk, len(tokens) - known),
        )
        return caches, rest

    def insert_cache(
        self, model: Any, tokens: Sequence[int], prompt_cache: list[Any], **kwargs: Any
    ) -> None:
        """Like mlx-lm's; what is new is written to disk, off this thread.

        With a draft model the caches hold fewer tokens than were generated. They are kept under
        the tokens that they hold.
        """
        align(prompt_cache)
        length = covered(prompt_cache, len(tokens))
        if not length or (has_snapshots(prompt_cache) and not exact(prompt_cache, length)):
            return
        tokens = list(tokens[:length])
        self._memory.insert_cache(model, tokens, prompt_cache, **kwargs)
        self._stored.keep(self._space(model), tokens, prompt_cache)
