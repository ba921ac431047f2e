"""A model in two parts: its decoder layers, and the head that makes logits of their output.

The head runs on a few tokens at a time, so that a vocabulary of 262,144 tokens takes no more memory
than a small one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..model.layers import calls_replaced, decoder_layers
from ..model.memory import memory_limit
from ..model.replay import Recording, chained, finish, record

#: Least bytes of one float32 array (tokens, vocabulary). MLX holds up to twenty of them at once:
#: those of a chunk, and those that wait for operations in flight.
CHUNK = 64 << 20
#: The share of memory that such an array may take where that is more.
CHUNK_SHARE = 1 / 160

#: Takes over a decoder layer's call: ``(index, original, args, kwargs) -> output``.
LayerCall = Callable[[int, Any, tuple, dict], Any]


class _Reached(Exception):
    """Leaves a forward pass behind the last decoder layer."""

    def __init__(self, hidden: mx.array):
        self.hidden = hidden


@dataclass(frozen=True)
class Parts:
    """How to run a model's two parts.

    Attributes:
        model: An mlx-lm model.
        recording: Of two tokens; None if the layers do not hand on a hidden state plainly, or the
            head mixes tokens. The model then is all layers, and its logits are their output.
        plain: Whether the layers hand each other nothing but arrays.
        tokens: Tokens of which logits are made at once.
        dim: Of what the layers return: the hidden state, or the logits.
        vocabulary: Logits of a token.
        limit: Bytes of one float32 array (tokens, vocabulary).
    """

    model: nn.Module
    recording: Recording | None
    plain: bool
    tokens: int
    dim: int
    vocabulary: int
    limit: int

    @classmethod
    def of(cls, model: nn.Module, batch: int, length: int, limit: int | None = None) -> "Parts":
        """Find out how a model can be run.

        Args:
            model: An mlx-lm model.
            batch: Sequences that are run at once.
            length: Tokens of each.
            limit: Bytes of one float32 array (tokens, vocabulary); None for what memory allows.
        """
        limit = limit or max(CHUNK, int(CHUNK_SHARE * memory_limit()))
        logits, recording = record(model, mx.array([[0, 1]]))
        vocabulary, total = logits.shape[-1], batch * length
        chunks = -(-total // max(1, min(total, limit // (4 * vocabulary))))
        tokens, plain = -(-total // chunks), bool(recording)
        if not _apart(model, logits, recording):
            return cls(model, None, plain, tokens, vocabulary, vocabulary, limit)
        dim = recording[-1].hidden_out.shape[-1]
        return cls(model, recording, plain, tokens, dim, vocabulary, limit)

    def fits(self, tokens: int) -> bool:
        """Whether so many tokens' logits may be made at once, or must be."""
        return self.recording is None or 4 * tokens * self.vocabulary <= self.limit

    def logits(self, tokens: mx.array, layer: LayerCall | None = None) -> Iterator[mx.array]:
        """Logits (rows, vocabulary) of a batch, some rows at a time.

        Each is to be evaluated and released before the next is asked for.

        Args:
            tokens: int32 (batch, length).
            layer: Runs each layer, if not the layer itself.
        """
        if self.fits(tokens.size):
            with calls_replaced(decoder_layers(self.model) if layer else [], layer):
                logits = self.model(tokens)
            yield logits.reshape(-1, self.vocabulary)
            return
        hidden = self.body(tokens, layer)
        mx.eval(hidden)
        for start in range(0, len(hidden), self.tokens):
            yield self.head(hidden[start : start + self.tokens])

    def body(self, tokens: mx.array, layer: LayerCall | None = None) -> mx.array:
        """What the decoder layers make of tokens, (batch * length, dim).

        Args:
            tokens: int32 (batch, length).
            layer: Runs each layer, if not the layer itself.
        """
        last = self.recording[-1].index if self.recording else None  # some may never run

        def call(index: int, original: Any, args: tuple, kwargs: dict) -> Any:
            output = (
                original(*args, **kwargs) if layer is None else layer(index, original, args, kwargs)
            )
            if index == last:
                raise _Reached(output[0] if isinstance(output, tuple) else output)
            return output

        try:
            with calls_replaced(decoder_layers(self.model), call):
                output = self.model(tokens)
        except _Reached as reached:
            output = reached.hidden
        return output.reshape(-1, self.dim)

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (tokens, vocabulary) of some rows (tokens, dim) of `body`."""
        if self.recording is None:
            return hidden
        tokens = mx.zeros((1, len(hidden)), mx.int32)
        return finish(self.model, tokens, self.recording, hidden[None])[0]


def _apart(model: nn.Module, logits: mx.array, recording: Recording) -> bool:
    """Whether the head makes a token's logits of its own hidden state alone."""
    if not chained(recording) or recording[-1].hidden_out.shape[:-1] != (1, 2):
        return False
    hidden = recording[-1].hidden_out[:, 1:]
    try:
        alone = finish(model, mx.zeros((1, 1), mx.int32), recording, hidden)
    except ValueError:  # shapes that do not go together
        return False
    near = mx.allclose(alone[0], logits[0, 1:], rtol=1e-2, atol=1e-2, equal_nan=True)
    return alone.shape == (1, 1, logits.shape[-1]) and bool(near)
