"""Run a model from one of its decoder layers on, with the layers before it replayed.

A change in layer ``i`` leaves the outputs of the layers before it as they were. They are recorded
once, and a run that starts at layer ``i`` hands them out instead of computing them. The model's own
forward pass is used, so masks, norms, shared keys and the head need no knowledge of the
architecture.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map


@dataclass
class Call:
    """What one decoder layer was called with, and what it returned.

    Attributes:
        args: Positional arguments; the hidden state (batch, length, dim) comes first.
        kwargs: The others, such as mask and cache.
        output: The hidden state, or a tuple that starts with it.
        index: Of the layer; a model may run its layers more than once.
        follows: Whether the hidden state came in just as the layer before returned it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    index: int = 0
    follows: bool = True

    @property
    def hidden(self) -> Any:
        """The hidden state that came in."""
        return self.args[0] if self.args else None

    @property
    def hidden_out(self) -> Any:
        """The hidden state that came out."""
        return self.output[0] if isinstance(self.output, tuple) else self.output


Recording = Sequence[Call]


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
def calls_replaced(layers: list[nn.Module], call: Any) -> Iterator[None]:
    """Give each layer's ``__call__`` to ``call(index, original, args, kwargs)``.

    ``original`` is the layer's own call, bound to it.

    The class is swapped for a subclass, since Python looks ``__call__`` up on the type.
    """
    classes, calls = [type(layer) for layer in layers], [call]
    try:
        replace_calls(layers, lambda *given: calls[0](*given))
        yield
    finally:
        calls.clear()  # a class is collected late, and must not keep what the call gathered
        for layer, cls in zip(layers, classes, strict=True):
            layer.__class__ = cls


def replace_calls(layers: list[nn.Module], call: Any) -> None:
    """As `calls_replaced`, for good."""
    for index, layer in enumerate(layers):
        cls = type(layer)

        def replaced(self, *args, _index=index, _cls=cls, **kwargs):
            return call(_index, partial(_cls.__call__, self), args, kwargs)

        layer.__class__ = type(cls.__name__, (cls,), {"__call__": replaced})


def record(model: nn.Module, tokens: mx.array) -> tuple[mx.array, Recording]:
    """Run a batch and keep each decoder layer's call.

    Args:
        model: An mlx-lm model.
        tokens: int32 of shape (batch, length).

    Returns:
        Logits (batch, length, vocabulary) and the recording, one entry a call. It is empty if the
        layers hand each other more than arrays, such as a cache that they write to: their outputs
        then do not tell what they did.
    """
    recording: list[Call] = []
    returned: Any = None

    def call(index: int, original: Any, args: tuple, kwargs: dict) -> Any:
        nonlocal returned
        follows = not recording or (bool(args) and args[0] is returned)
        kept = copied(args), copied(kwargs)
        output = original(*args, **kwargs)
        returned = output[0] if isinstance(output, tuple) and output else output
        recording.append(Call(*kept, copied(output), index, follows))
        return output

    with calls_replaced(decoder_layers(model), call):
        logits = model(tokens)
    parts = [part for c in recording for part in (c.args, *c.kwargs.values(), c.output)]
    if not all(plain(part) for part in parts):
        recording = []
    mx.eval(logits, [arrays(part) for part in parts])
    return logits, recording


def plain(value: Any) -> bool:
    """Whether a value is all that it seems: nobody can leave a message in it."""
    if isinstance(value, tuple):
        return all(plain(part) for part in value)
    return value is None or isinstance(value, mx.array | nn.Module | str | int | float)


def copied(value: Any) -> Any:
    """The same with new handles on its arrays, which item assignment elsewhere does not change."""
    return tree_map(
        lambda leaf: copy(leaf) if isinstance(leaf, mx.array) else leaf,
        value,
        is_leaf=nn.Module.is_module,
    )


def arrays(value: Any) -> list[mx.array]:
    """The floating-point arrays in what a layer takes or returns, in order."""
    leaves = tree_flatten([value], is_leaf=nn.Module.is_module)
    return [leaf for _, leaf in leaves if isinstance(leaf, mx.array) and _floating(leaf)]


def with_arrays(value: Any, given: list[mx.array]) -> Any:
    """The same with others in place of its floating-point `arrays`."""
    others = iter(given)
    return tree_map(
        lambda leaf: next(others) if _floating(leaf) else leaf,
        value,
        is_leaf=nn.Module.is_module,
    )


def _floating(leaf: Any) -> bool:
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


def resume(model: nn.Module, tokens: mx.array, recording: Recording, start: int) -> mx.array:
    """Run a batch with the layers before ``start`` replayed.

    Args:
        model: The model that was recorded, changed in layer ``start`` or later only.
        tokens: The recorded batch, int32 (batch, length).
        recording: From `record`; without one the whole model is computed.
        start: Index of the first layer to compute; the number of layers computes the head only.

    Returns:
        Logits (batch, length, vocabulary), not evaluated.
    """
    later = (n for n, call in enumerate(recording) if call.index >= start)
    replayed = iter(recording[: next(later, len(recording))])

    def call(_: int, original: Any, args: tuple, kwargs: dict) -> Any:
        known = next(replayed, None)
        return original(*args, **kwargs) if known is None else copied(known.output)

    with calls_replaced(decoder_layers(model), call):
        return model(tokens)


def joined(
    model: nn.Module,
    tokens: mx.array,
    recording: Recording,
    outputs: Mapping[int, list[mx.array]],
) -> tuple[list[list[mx.array]], mx.array]:
    """What a model does around its decoder layers, with their outputs replayed.

    Args:
        model: The model that was recorded.
        tokens: The recorded batch, int32 (batch, length).
        recording: From `record`, not empty.
        outputs: Number of a call -> other `arrays` for it to return.

    Returns:
        The `arrays` that each call was handed, and the logits; not evaluated.
    """
    handed: list[list[mx.array]] = []

    def call(_: int, __: Any, args: tuple, kwargs: dict) -> Any:
        number = len(handed)
        # A sum is an array of its own: what is handed on twice would count once in a gradient.
        handed.append([array + 0 for array in arrays((args, kwargs))])
        output = copied(recording[number].output)
        return with_arrays(output, outputs[number]) if number in outputs else output

    with calls_replaced(decoder_layers(model), call):
        logits = model(tokens)
    return handed, logits


def finish(model: nn.Module, tokens: mx.array, recording: Recording, hidden: mx.array) -> mx.array:
    """Logits when the last decoder layer's hidden state is ``hidden``; not evaluated."""
    last = len(recording) - 1
    others = arrays(recording[last].output)[1:]
    return joined(model, tokens, recording, {last: [hidden, *others]})[1]


def chained(recording: Recording) -> bool:
    """Whether each layer runs once and takes the hidden state just as the one before returned it.

    Other arrays may be handed on beside it, such as shared keys and values.
    """
    return (
        bool(recording)
        and [call.index for call in recording] == list(range(len(recording)))
        and all(call.follows for call in recording)
        and all(
            isinstance(call.hidden, mx.array) and isinstance(call.hidden_out, mx.array)
            for call in recording
        )
    )
