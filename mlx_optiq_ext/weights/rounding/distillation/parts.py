"""A model in two parts: its decoder layers, and the head that makes logits of their output.

The head runs on a few tokens at a time, so that a vocabulary of 262,144 tokens takes no more memory
than a small one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ....model.layers import calls_replaced, decoder_layers
from ....model.memory import memory_limit
from ....model.replay import Recording, chained, finish, record

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
        recording: Of one row of `tokens` tokens; None if the layers do not hand on a hidden state
            plainly. The model then is all layers, and its logits are their output.
        plain: Whether the layers hand each other nothing but arrays.
        tokens: Tokens of which logits are made at once.
        chunks: How many times `tokens` make a batch.
        dim: Of what the layers return: the hidden state, or the logits.
    """

    model: nn.Module
    recording: Recording | None
    plain: bool
    tokens: int
    chunks: int
    dim: int

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
        logits, recording = record(model, mx.zeros((1, 2), mx.int32))
        vocabulary, total = logits.shape[-1], batch * length
        chunks = -(-total // max(1, min(total, limit // (4 * vocabulary))))
        tokens = -(-total // chunks)
        plain = bool(recording)
        if not chained(recording):
            return cls(model, None, plain, tokens, chunks, vocabulary)
        _, recording = record(model, mx.zeros((1, tokens), mx.int32))
        return cls(model, recording, plain, tokens, chunks, recording[-1].hidden_out.shape[-1])

    def body(self, tokens: mx.array, layer: LayerCall | None = None) -> mx.array:
        """What the decoder layers make of tokens, (batch * length, dim).

        Args:
            tokens: int32 (batch, length).
            layer: Runs each layer, if not the layer itself.
        """
        last = len(decoder_layers(self.model)) - 1

        def call(index: int, original: Any, args: tuple, kwargs: dict) -> Any:
            output = (
                original(*args, **kwargs) if layer is None else layer(index, original, args, kwargs)
            )
            if self.recording is not None and index == last:
                raise _Reached(output[0] if isinstance(output, tuple) else output)
            return output

        try:
            with calls_replaced(decoder_layers(self.model), call):
                output = self.model(tokens)
        except _Reached as reached:
            output = reached.hidden
        return output.reshape(-1, self.dim)

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (tokens, vocabulary) of `tokens` rows (tokens, dim) of `body`."""
        if self.recording is None:
            return hidden
        tokens = mx.zeros((1, self.tokens), mx.int32)
        return finish(self.model, tokens, self.recording, hidden[None])[0]
