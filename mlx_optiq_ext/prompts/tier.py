"""The prompt cache of a server: mlx-lm's own in memory, and a store behind it."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from .agreement import longest
from .reuse import StoredPrompts
from .space import Space
from .splitting import align, covered, exact, has_snapshots, rewind

_log = logging.getLogger(__name__)

#: Ends of prompts that are remembered while these are computed.
ENDS = 64
#: What mlx-lm calls a sequence with its answer.
ANSWER = "assistant"


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
        # Prompts that are being computed, and parts of them that end where others may go on.
        self._ends: deque[tuple[Any, list[int]]] = deque(maxlen=ENDS)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def __len__(self) -> int:
        return len(self._memory)

    def fetch_nearest_cache(self, model: Any, tokens: Sequence[int]) -> Any:
        """Like mlx-lm's, from memory or from disk; at least one token is left to compute.

        Processes that run parts of one model all go on from the same token.
        """
        tokens = list(tokens)
        self._ends.append((model, tokens))

        def find(most: int) -> tuple[tuple[list[Any] | None, int], int]:
            caches, memory = self._remembered(model, tokens, most)
            found = self._stored.find(self._space(model), tokens, memory, most)
            return ((caches, memory), memory) if found is None else ((found[0], 0), found[1])

        (caches, memory), known = longest(find, len(tokens) - 1)
        if not known:
            caches = self._space(model).make()
        _log.info(
            "[optiq] prompt of %d tokens: %d from memory, %d from disk, %d computed",
            *(len(tokens), memory, known - memory, len(tokens) - known),
        )
        return caches, tokens[known:]

    def _remembered(self, model: Any, tokens: list[int], most: int) -> tuple[list[Any] | None, int]:
        """Caches in memory of the longest prefix of at most so many tokens, and its length."""
        if not most:
            return None, 0
        # mlx-lm leaves a token to compute where it can trim what it has.
        caches, rest = self._memory.fetch_nearest_cache(model, tokens[: most + 1])
        if caches is not None and not rest:
            most -= 1
            caches, rest = self._memory.fetch_nearest_cache(model, tokens[: most + 1])
        return caches, 0 if caches is None else rewind(caches, most + 1 - len(rest))

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
        if kwargs.get("cache_type", ANSWER) == ANSWER:
            ends = [*self._ended(model, tokens), len(tokens)]
        else:
            self._ends.append((model, tokens))
            ends = []
        self._stored.keep(self._space(model), tokens, prompt_cache, ends)

    def _ended(self, model: Any, tokens: list[int]) -> list[int]:
        """The ends that lie in a finished sequence; they are not looked for again."""
        found = [
            each for each in self._ends if each[0] == model and tokens[: len(each[1])] == each[1]
        ]
        for each in found:
            self._ends.remove(each)
        return [len(each) for _, each in found]
