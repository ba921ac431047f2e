"""One sequence at a time, as ``mlx_lm.generate`` and ``mlx_lm.chat`` run a model."""

import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

import mlx.core as mx

from .. import distributed
from .agreement import divides, longest
from .reuse import StoredPrompts
from .segments import places
from .space import Space


def prefill(
    model: Callable[..., Any],
    tokens: list[int],
    known: int,
    caches: list[Any],
    keep: Callable[[list[int]], None],
    enders: Collection[int] = (),
    step: int = 2048,
) -> int:
    """Compute a prompt but its last token, and keep the state of its layers on the way.

    Without a layer whose state belongs to one length of the prompt, in this process or in another,
    nothing is computed.

    Args:
        model: Called as mlx-lm's models are.
        tokens: The whole prompt.
        known: Tokens that the caches hold.
        caches: One row's, filled in place.
        keep: Called with the tokens that the caches hold, at the `places` of the prompt.
        enders: Tokens that end a message.
        step: Tokens that are computed at a time.

    Returns:
        How many tokens the caches hold.
    """
    if not divides(caches):
        return known
    last = len(tokens) - 1
    for place in sorted({*places(tokens, enders), last}):
        if not known < place <= last:
            continue
        while known < place:
            stop = min(known + step, place)
            model(mx.array(tokens[known:stop])[None], cache=caches)
            mx.eval([cache.state for cache in caches])
            mx.clear_cache()
            known = stop
        keep(tokens[:place])
    return known


class Sequences:
    """Takes the beginning of sequences from a store, and keeps them there.

    Args:
        stored: The store.

    Attributes:
        enders: Tokens that end a message; none until the tokenizer is known.
    """

    def __init__(self, stored: StoredPrompts):
        self.enders: Collection[int] = ()
        self._stored = stored
        # The caches of the running conversation, and the tokens that they hold.
        self._latest: tuple[list[Any], list[int]] | None = None

    def run(
        self,
        space: Space,
        prompt: list[int],
        caches: list[Any],
        generate: Callable[[list[int]], Iterator[tuple[int, Any]]],
        model: Callable[..., Any],
        step: int = 2048,
    ) -> Iterator[tuple[int, Any]]:
        """Generate behind a prompt.

        Args:
            space: What it is computed with.
            prompt: Its tokens, without those that the caches hold.
            caches: One row's, filled in place. Caches that another program filled are left alone.
            generate: Generates behind the tokens that it is given, with these caches.
            model: Computes what `prefill` does.
            step: Tokens that it computes at a time.
        """
        before = self._tokens(caches)
        if before is None:
            yield from generate(prompt)
            return
        tokens, known = [*before, *prompt], len(before)
        if not before:
            found, known = longest(
                lambda most: self._stored.find(space, prompt, most=most) or (space.make(), 0),
                len(prompt) - 1,
            )
            caches[:] = found
        if known > len(before) and distributed.leads():
            print(
                f"[optiq] {known} of the prompt's {len(prompt)} tokens were on disk",
                file=sys.stderr,
            )

        asked = len(tokens)

        def keep(held: list[int]) -> None:
            self._stored.keep(space, held, caches)

        known = prefill(model, tokens, known, caches, keep, self.enders, step)
        rest = tokens[known:]
        try:
            for token, logprobs in generate(rest):
                tokens.append(int(token))
                yield token, logprobs
        except GeneratorExit:
            self._keep(space, tokens, caches, asked)
            raise
        self._keep(space, tokens, caches, asked)

    def _tokens(self, caches: list[Any]) -> list[int] | None:
        """The tokens that caches hold; None if that is not known."""
        if all(cache.empty() for cache in caches):
            return []
        latest = self._latest
        return latest[1] if latest is not None and latest[0] is caches else None

    def _keep(self, space: Space, tokens: list[int], caches: list[Any], asked: int) -> None:
        self._latest = caches, tokens
        self._stored.keep(space, tokens, caches, [asked, len(tokens)])
