"""Runs a model from one of its decoder layers on, and replays the layers before it.

A change in layer ``i`` does not change the outputs of earlier layers. They are recorded once, and a
run from layer ``i`` on returns the recorded outputs instead of computing them. The model's own
forward pass is used, so masks, norms, shared keys and the head need no knowledge of the
architecture.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .layers import arrays, calls_replaced, copied, decoder_layers, plain, with_arrays


@dataclass
class Call:
    """A decoder layer's call: its arguments and its result.

    Attributes:
        args: Positional arguments; the hidden state (batch, length, dim) comes first.
        kwargs: The others, such as mask and cache.
        output: The hidden state, or a tuple that starts with it.
        index: Index of the layer; a model may run its layers more than once.
        follows: Whether the hidden state is exactly the output of the layer before.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    index: int = 0
    follows: bool = True

    @property
    def hidden(self) -> Any:
        """The incoming hidden state."""
        return self.args[0] if self.args else None

    @property
    def hidden_out(self) -> Any:
        """The outgoing hidden state."""
        return self.output[0] if isinstance(self.output, tuple) else self.output

    def entered(self, hidden: mx.array) -> "Call":
        """The call with another incoming hidden state."""
        return replace(self, args=(hidden, *self.args[1:]))


Recording = Sequence[Call]


def record(
    model: nn.Module, tokens: mx.array, into: Any | None = None
) -> tuple[mx.array, Recording]:
    """Run a batch and keep each decoder layer's call.

    Args:
        model: An mlx-lm model.
        tokens: int32 of shape (batch, length).
        into: An empty recording that evaluates what is appended; None for one in memory.

    Returns:
        Logits (batch, length, vocabulary), not evaluated, and the recording, one entry a call. It
        is empty if the layers pass each other more than arrays, such as a cache that they write to:
        then their outputs do not contain all their effects.
    """
    recording: Any = [] if into is None else into
    returned, usable = None, True

    def call(index: int, original: Any, args: tuple, kwargs: dict) -> Any:
        nonlocal returned, usable
        follows = not recording or (bool(args) and args[0] is returned)
        kept = copied(args), copied(kwargs)
        output = original(*args, **kwargs)
        returned = output[0] if isinstance(output, tuple) and output else output
        one = Call(*kept, copied(output), index, follows)
        usable = usable and all(plain(p) for p in (one.args, *one.kwargs.values(), one.output))
        if usable:
            recording.append(one)
        return output

    with calls_replaced(decoder_layers(model), call):
        logits = model(tokens)
    if not usable:
        return logits, []
    if into is None:
        mx.eval([arrays((one.args, one.kwargs, one.output)) for one in recording])
    return logits, recording


def replayed(recording: Recording, start: int) -> Callable[..., Any]:
    """Runs a model from a layer on: takes over its layers' calls in one forward pass.

    Args:
        recording: From `record`; without one the whole model is computed. The model may have
            changed in layer ``start`` or later.
        start: Index of the first layer to compute; the number of layers computes the head only.

    Returns:
        For `calls_replaced`.
    """
    later = (n for n, call in enumerate(recording) if call.index >= start)
    known = iter(recording[: next(later, len(recording))])

    def call(_: int, original: Any, args: tuple, kwargs: dict) -> Any:
        one = next(known, None)
        return original(*args, **kwargs) if one is None else copied(one.output)

    return call


def joined(
    model: nn.Module,
    tokens: mx.array,
    recording: Recording,
    outputs: Mapping[int, list[mx.array]],
) -> tuple[list[list[mx.array]], mx.array]:
    """Run a model around its decoder layers, whose outputs are replayed.

    Args:
        model: The model that was recorded.
        tokens: The recorded batch, int32 (batch, length).
        recording: From `record`, not empty.
        outputs: Number of a call -> other `arrays` for it to return.

    Returns:
        The `arrays` in each call's arguments, and the logits; not evaluated.
    """
    handed, call = replaced(recording, outputs)
    with calls_replaced(decoder_layers(model), call):
        logits = model(tokens)
    return handed, logits


def replaced(
    recording: Recording, outputs: Mapping[int, list[mx.array]]
) -> tuple[list[list[mx.array]], Callable[..., Any]]:
    """Runs a model around its decoder layers: takes over their calls in one forward pass.

    Args:
        recording: From `record`, not empty.
        outputs: Number of a call -> other `arrays` for it to return.

    Returns:
        The `arrays` in each call's arguments, filled as the calls come, and what `calls_replaced`
        takes.
    """
    handed: list[list[mx.array]] = []

    def call(_: int, __: Any, args: tuple, kwargs: dict) -> Any:
        number = len(handed)
        # The sum makes a new array: an array that is passed on twice must count twice in a
        # gradient.
        handed.append([array + 0 for array in arrays((args, kwargs))])
        output = copied(recording[number].output)
        return with_arrays(output, outputs[number]) if number in outputs else output

    return handed, call


def finish(model: nn.Module, tokens: mx.array, recording: Recording, hidden: mx.array) -> mx.array:
    """Logits for the hidden state after the last decoder layer; not evaluated."""
    last = len(recording) - 1
    others = arrays(recording[last].output)[1:]
    return joined(model, tokens, recording, {last: [hidden, *others]})[1]


def chained(recording: Recording) -> bool:
    """Whether each layer runs once, on exactly the hidden state that the one before returned.

    Other arrays may be passed on too, such as shared keys and values.
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
