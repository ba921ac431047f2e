"""Records many batches together: each decoder layer runs on all batches before the next layer."""

from contextlib import ExitStack
from itertools import count
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .layers import arrays, calls_replaced, copied, decoder_layers, plain
from .replay import Call, Recording, chained, record
from .spill import Spill, SpilledRecording
from .stream import Stream


class _Reached(Exception):
    """Ends a forward pass at the wanted call."""

    def __init__(self, call: Call):
        self.call = call


def recordings(
    model: nn.Module,
    batches: list[mx.array],
    stream: Stream | None = None,
    spill: Spill | None = None,
) -> list[Recording]:
    """Record each batch, as `record` does.

    Args:
        model: An mlx-lm model.
        batches: Token batches, int32 (batch, length).
        stream: The model's stream, if its layers are on disk. Each layer is then read once for all
            batches, and its arguments and results are kept on disk.
        spill: Where to keep the recordings of a model in memory; None keeps them there too.

    Returns:
        One recording a batch; all are empty if that of any is, as `record` says.
    """
    if stream is None:
        kept = [
            record(model, tokens, None if spill is None else SpilledRecording(spill))[1]
            for tokens in batches
        ]
        return kept if all(kept) else [[] for _ in batches]
    found = [SpilledRecording(stream.spill) for _ in batches]
    for _ in count():
        with ExitStack() as held:
            for tokens, recording in zip(batches, found, strict=True):
                call = _next(model, tokens, recording, stream, held)
                if call is None:
                    return list(found)
                parts = (call.args, *call.kwargs.values(), call.output)
                if not all(plain(part) for part in parts):
                    return [[] for _ in batches]
                recording.append(call)
    return []


def outlines(model: nn.Module, batches: list[mx.array]) -> list[Recording] | None:
    """Each batch's calls without what the layers compute, for layers that run one after another.

    Args:
        model: An mlx-lm model.
        batches: Token batches, int32 (batch, length).

    Returns:
        One recording a batch, not evaluated, whose hidden states are all that which enters the
        first layer. None if calls depend on more than tokens and the hidden state before them.
    """
    tokens = mx.array([[0, 1]])
    known = record(model, tokens)[1]
    if not chained(known) or not all(isinstance(call.output, mx.array) for call in known):
        return None
    for one, other in zip(known, _outline(model, tokens), strict=True):
        if not _alike((one.args[1:], one.kwargs), (other.args[1:], other.kwargs)):
            return None
    return [_outline(model, tokens) for tokens in batches]


def _outline(model: nn.Module, tokens: mx.array) -> list[Call]:
    found: list[Call] = []

    def call(index: int, _: Any, args: tuple, kwargs: dict) -> Any:
        found.append(Call(copied(args), copied(kwargs), args[0], index))
        return args[0]

    with calls_replaced(decoder_layers(model), call):
        model(tokens)
    return found


def _alike(one: Any, other: Any) -> bool:
    """Whether two calls' arguments are the same, with equal arrays."""
    found, others = (tree_flatten([value], is_leaf=nn.Module.is_module) for value in (one, other))
    return len(found) == len(others) and all(
        path == name
        and (
            a.shape == b.shape and bool(mx.array_equal(a, b))
            if isinstance(a, mx.array) and isinstance(b, mx.array)
            else a is b or a == b
        )
        for (path, a), (name, b) in zip(found, others, strict=True)
    )


def entry(model: nn.Module, tokens: mx.array) -> mx.array:
    """The hidden state (batch, length, dim) that enters the first decoder layer."""

    def call(index: int, _: Any, args: tuple, kwargs: dict) -> Any:
        raise _Reached(Call(copied(args), kwargs, None, index))

    try:
        with calls_replaced(decoder_layers(model), call):
            model(tokens)
    except _Reached as reached:
        return reached.call.hidden
    raise ValueError("the model runs none of its layers")


def _next(
    model: nn.Module, tokens: mx.array, recording: Recording, stream: Stream, held: ExitStack
) -> Call | None:
    """The call after those recorded; None if there is none."""
    replayed, returned = iter(recording), None

    def call(index: int, original: Any, args: tuple, kwargs: dict) -> Any:
        nonlocal returned
        known = next(replayed, None)
        if known is not None:
            output = copied(known.output)
            returned = output[0] if isinstance(output, tuple) and output else output
            return output
        follows = not recording or (bool(args) and args[0] is returned)
        kept = copied(args), copied(kwargs)
        held.enter_context(stream.layer(index))
        reached = Call(*kept, copied(original(*args, **kwargs)), index, follows)
        mx.eval([arrays(part) for part in (*kept, reached.output)])
        raise _Reached(reached)

    try:
        with calls_replaced(decoder_layers(model), call):
            model(tokens)
    except _Reached as reached:
        return reached.call
    return None
