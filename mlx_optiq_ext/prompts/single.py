"""One sequence at a time, as ``mlx_lm.generate`` and ``mlx_lm.chat`` run a model."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

from .reuse import StoredPrompts
from .space import Space


class Sequences:
    """Takes the beginning of sequences from a store, and keeps them there.

    Args:
        stored: The store.
    """

    def __init__(self, stored: StoredPrompts):
        self._stored = stored
        # The caches of the running conversation, and the tokens that they hold.
        self._latest: tuple[list[Any], list[int]] | None = None

    def run(
        self,
        space: Space,
        prompt: list[int],
        caches: list[Any],
        generate: Callable[[list[int]], Iterator[tuple[int, Any]]],
    ) -> Iterator[tuple[int, Any]]:
        """Generate behind a prompt.

        Args:
            space: What it is computed with.
            prompt: Its tokens, without those that the caches hold.
            caches: One row's, filled in place. Caches that another program filled are left alone.
            generate: Generates behind the tokens that it is given, with these caches.
        """
        before = self._tokens(caches)
        if before is None:
            yield from generate(prompt)
            return
        rest = prompt
        found = None if before else self._stored.find(space, prompt)
        if found is not None:
            caches[:], rest = found[0], prompt[found[1] :]
            print(
                f"[optiq] {found[1]} of the prompt's {len(prompt)} tokens were on disk",
                file=sys.stderr,
            )
        tokens = [*before, *prompt]
        try:
            for token, logprobs in generate(rest):
                tokens.append(int(token))
                yield token, logprobs
        except GeneratorExit:
            self._keep(space, tokens, caches)
            raise
        self._keep(space, tokens, caches)

    def _tokens(self, caches: list[Any]) -> list[int] | None:
        """The tokens that caches hold; None if that is not known."""
        if all(cache.empty() for cache in caches):
            return []
        latest = self._latest
        return latest[1] if latest is not None and latest[0] is caches else None

    def _keep(self, space: Space, tokens: list[int], caches: list[Any]) -> None:
        self._latest = caches, tokens
        self._stored.keep(space, tokens, caches)
