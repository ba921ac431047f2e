"""Run a model from one of its decoder layers on, with the layers before it replayed.

A change in layer ``i`` leaves the outputs of the layers before it as they were. They are recorded
once, and a run that starts at layer ``i`` hands them out instead of computing them. The model's own
forward pass is used, so masks, norms, shared keys and the head need no knowledge of the
architecture.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


@dataclass
class Call:
    """What one decoder layer was called with, and what it returned.

    Attributes:
        args: Positional arguments; the hidden state (batch, length, dim) comes first.
        kwargs: The others, such as mask and cache.
        output: The hidden state, or a tuple that starts with it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def hidden(self) -> Any:
        """The hidden state that came in."""
        return self.args[0] if self.args else None

    @property
    def hidden_out(self) -> Any:
        """The hidden state that came out."""
        return self.output[0] if isinstance(self.output, tuple) else self.output

    def with_hidden_out(self, hidden: mx.array) -> Any:
        """The output with another hidden state."""
        return (hidden, *self.output[1:]) if isinstance(self.output, tuple) else hidden


Recording = list[Call]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers in order, or an empty list if the model does not name them."""
    layers = getattr(model, "layers", None)
    if not isinstance(layers, list | tuple):
        return []
    return [layer for layer in layers if isinstance(layer, nn.Module)]


def layer_index(model: nn.Module) -> dict[str, int]:
    """Maps the path of every module inside a decoder layer to that layer's index."""
    position = {id(layer): index for index, layer in enumerate(decoder_layers(model))}
    prefixes = {path: position[id(m)] for path, m in model.named_modules() if id(m) in position}
    return {
        path: prefixes[prefix]
        for path, _ in model.named_modules()
        for prefix in _parents(path)
        if prefix in prefixes
    }


def _parents(path: str) -> Iterator[str]:
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        yield ".".join(parts[:end])


@contextmanager
def _calls_replaced(layers: list[nn.Module], call: Any) -> Iterator[None]:
    """Give each layer's ``__call__`` to ``call(index, original, args, kwargs)``.

    ``original`` is the layer's own call, bound to it.

    The class is swapped for a subclass, since Python looks ``__call__`` up on the type.
    """
    classes = [type(layer) for layer in layers]
    try:
        for index, (layer, cls) in enumerate(zip(layers, classes, strict=True)):

            def replaced(self, *args, _index=index, _cls=cls, **kwargs):
                return call(_index, partial(_cls.__call__, self), args, kwargs)

            layer.__class__ = type(cls.__name__, (cls,), {"__call__": replaced})
        yield
    finally:
        for layer, cls in zip(layers, classes, strict=True):
            layer.__class__ = cls


def record(model: nn.Module, tokens: mx.array) -> tuple[mx.array, Recording]:
    """Run a batch and keep each decoder layer's call.

    Args:
        model: An mlx-lm model.
        tokens: int32 of shape (batch, length).

    Returns:
        Logits (batch, length, vocabulary) and the recording, one entry a layer.
    """
    layers = decoder_layers(model)
    recording: Recording = []

    def call(index: int, original: Any, args: tuple, kwargs: dict) -> Any:
        recording.append(Call(args, kwargs, original(*args, **kwargs)))
        return recording[-1].output

    with _calls_replaced(layers, call):
        logits = model(tokens)
    mx.eval(logits, [_arrays(c.output) for c in recording], [_arrays(c.args) for c in recording])
    return logits, recording


def _arrays(value: Any) -> list[mx.array]:
    leaves = tree_flatten(value) if isinstance(value, list | tuple | dict) else [("", value)]
    return [leaf for _, leaf in leaves if isinstance(leaf, mx.array)]


def resume(model: nn.Module, tokens: mx.array, recording: Recording, start: int) -> mx.array:
    """Run a batch with the layers before ``start`` replayed.

    Args:
        model: The model that was recorded, changed in layer ``start`` or later only.
        tokens: The recorded batch, int32 (batch, length).
        recording: From `record`.
        start: Index of the first layer to compute; the number of layers computes the head only.

    Returns:
        Logits (batch, length, vocabulary), not evaluated.
    """
    with _calls_replaced(decoder_layers(model)[:start], lambda index, *_: recording[index].output):
        return model(tokens)


def finish(model: nn.Module, tokens: mx.array, recording: Recording, hidden: mx.array) -> mx.array:
    """Logits when the last decoder layer's hidden state is ``hidden``; not evaluated."""
    last = len(recording) - 1

    def call(index: int, *_: Any) -> Any:
        return (
            recording[index].with_hidden_out(hidden) if index == last else recording[index].output
        )

    with _calls_replaced(decoder_layers(model), call):
        return model(tokens)


def front(model: nn.Module, tokens: mx.array, recording: Recording) -> mx.array:
    """The hidden state that enters the first decoder layer, computed anew; not evaluated."""
    entered: list[mx.array] = []

    def call(index: int, original: Any, args: tuple, kwargs: dict) -> Any:
        if index == 0:
            entered.append(args[0])
        return recording[index].output

    with _calls_replaced(decoder_layers(model), call):
        model(tokens)
    return entered[0]


def chained(recording: Recording) -> bool:
    """Whether each layer takes the hidden state just as the one before returned it."""
    return (
        bool(recording)
        and all(
            isinstance(call.hidden, mx.array) and isinstance(call.hidden_out, mx.array)
            for call in recording
        )
        and all(later.hidden is earlier.hidden_out for earlier, later in pairwise(recording))
    )
