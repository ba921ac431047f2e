"""Run a model from one of its decoder layers on, with the layers before it replayed.

A change in layer ``i`` leaves the outputs of the layers before it as they were. They are recorded
once, and a run that starts at layer ``i`` hands them out instead of computing them. The model's own
forward pass is used, so masks, norms, shared keys and the head need no knowledge of the
architecture.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

Recording = list[Any]


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

    The class is swapped for a subclass, since Python looks ``__call__`` up on the type.
    """
    classes = [type(layer) for layer in layers]
    try:
        for index, (layer, cls) in enumerate(zip(layers, classes, strict=True)):

            def replaced(self, *args, _index=index, _cls=cls, **kwargs):
                return call(_index, lambda: _cls.__call__(self, *args, **kwargs))

            layer.__class__ = type(cls.__name__, (cls,), {"__call__": replaced})
        yield
    finally:
        for layer, cls in zip(layers, classes, strict=True):
            layer.__class__ = cls


def record(model: nn.Module, tokens: mx.array) -> tuple[mx.array, Recording]:
    """Run a batch and keep what each decoder layer returned.

    Args:
        model: An mlx-lm model.
        tokens: int32 of shape (batch, length).

    Returns:
        Logits (batch, length, vocabulary) and the recording, one entry a layer.
    """
    layers = decoder_layers(model)
    recording: Recording = [None] * len(layers)

    def call(index: int, original: Any) -> Any:
        recording[index] = original()
        return recording[index]

    with _calls_replaced(layers, call):
        logits = model(tokens)
    mx.eval(logits, [value for _, value in tree_flatten(recording) if isinstance(value, mx.array)])
    return logits, recording


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
    with _calls_replaced(decoder_layers(model)[:start], lambda index, _: recording[index]):
        return model(tokens)
