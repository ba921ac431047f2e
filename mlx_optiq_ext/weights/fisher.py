"""Backward passes that gather every tensor's `Factors`, one decoder layer at a time."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping

import mlx.core as mx
import mlx.nn as nn

from .blocks import Recording, arrays, decoder_layers, joined, record, with_arrays
from .moments import Factors
from .packing import quantizable
from .taps import Use, tapped


def score(logits: mx.array, key: mx.array) -> mx.array:
    """Gradient of the negative log-likelihood of tokens drawn from the model, in its logits.

    Args:
        logits: (batch, length, vocabulary).
        key: For the draw.

    Returns:
        Of the same shape and dtype.
    """
    logits32 = logits.astype(mx.float32)
    drawn = mx.random.categorical(logits32, key=key)
    hot = drawn[..., None] == mx.arange(logits.shape[-1])
    return (mx.softmax(logits32, axis=-1) - hot).astype(logits.dtype)


def factors(
    model: nn.Module,
    batches: list[mx.array],
    each: Callable[[], object] = lambda: None,
    *,
    draws: int = 1,
    across: Collection[str] = (),
) -> dict[str, Factors]:
    """Measure the factors of every quantizable tensor with one backward pass a batch.

    The decoder layers' inputs are stored and one layer at a time is run again and differentiated,
    so that memory holds the model, the hidden states and one layer's activations. A model whose
    layers cannot be replayed is differentiated as a whole, one window at a time.

    Args:
        model: An mlx-lm model; left as it was.
        batches: Token batches, int32 (batch, length).
        each: Called after each batch.
        draws: How often labels are drawn and differentiated per batch.
        across: Paths whose whole output moment is wanted.
    """
    modules = dict(quantizable(model))
    found = {path: Factors() for path in modules}
    training = getattr(model, "training", False)  # recurrent_gemma skips nn.Module's set-up
    model.train()  # where a fused kernel has no gradient, mlx-lm trains without it
    try:
        for number, tokens in enumerate(batches):
            logits, recording = record(model, tokens)
            for draw in range(draws):
                cotangent = score(logits, mx.random.key(number * draws + draw))
                for factor in found.values():
                    factor.tokens += tokens.size
                if recording:
                    _by_layer(model, modules, tokens, recording, cotangent, found, across)
                    continue
                for window, pulled in zip(tokens[:, None], cotangent[:, None], strict=True):
                    _gather(modules, lambda t=window: [model(t)], [], [pulled], found, across)
            each()
    finally:
        model.train(training)
    return found


def _by_layer(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    tokens: mx.array,
    recording: Recording,
    cotangent: mx.array,
    found: dict[str, Factors],
    across: Collection[str],
) -> None:
    inside = {id(m): i for i, layer in enumerate(decoder_layers(model)) for m in layer.modules()}
    # Gradients at the arrays that each call was handed, from the last call to the first.
    pulled: list[list[mx.array]] = [[] for _ in recording]
    for number in reversed(range(len(recording))):
        call, layer = recording[number], decoder_layers(model)[recording[number].index]

        def after(*outputs: mx.array, number=number) -> list[mx.array]:
            handed, logits = joined(model, tokens, recording, {number: list(outputs)})
            return [logits, *_flat(handed[number + 1 :])]

        def run(*inputs: mx.array, layer=layer, call=call) -> list[mx.array]:
            args, kwargs = with_arrays((call.args, call.kwargs), list(inputs))
            return [array + 0 for array in arrays(layer(*args, **kwargs))]

        later = [cotangent, *_flat(pulled[number + 1 :])]
        _, gradients = mx.vjp(after, arrays(call.output), later)
        own = {path: m for path, m in modules.items() if inside.get(id(m)) == call.index}
        inputs = arrays((call.args, call.kwargs))
        pulled[number] = _gather(own, run, inputs, gradients, found, across)

    def around() -> list[mx.array]:
        handed, logits = joined(model, tokens, recording, {})
        return [logits, *_flat(handed)]

    outer = {path: m for path, m in modules.items() if id(m) not in inside}
    _gather(outer, around, [], [cotangent, *_flat(pulled)], found, across)


def _flat(lists: Iterable[list[mx.array]]) -> list[mx.array]:
    return [array for part in lists for array in part]


def _gather(
    modules: Mapping[str, nn.Module],
    run: Callable[..., list[mx.array]],
    inputs: list[mx.array],
    cotangents: list[mx.array],
    found: dict[str, Factors],
    across: Collection[str],
) -> list[mx.array]:
    """Differentiate one stretch, add what its layers saw, and return the gradients at its inputs.

    Args:
        modules: Layer path -> quantizable layer of this stretch.
        run: Computes the stretch.
        inputs: What ``run`` takes.
        cotangents: Gradients at what ``run`` returns.
        found: Is added to.
        across: Paths whose whole output moment is wanted.
    """
    uses: list[Use] = []

    def see(use: Use) -> mx.array:
        uses.append(use)
        return use.outputs

    with tapped(modules, see):
        run(*inputs)  # only traced, for the shapes: nothing of it is evaluated
    if not uses and not inputs:
        return []

    def probed(*primals: mx.array) -> list[mx.array]:
        again: list[Use] = []
        given, offsets = primals[: len(inputs)], primals[len(inputs) :]

        def shift(use: Use) -> mx.array:
            again.append(use)
            return use.outputs + offsets[len(again) - 1]

        with tapped(modules, shift):
            results = run(*given)
        return [*results, *(use.inputs for use in again if not use.lookup)]

    offsets = [mx.zeros(use.outputs.shape, use.outputs.dtype) for use in uses]
    seen = [use.inputs for use in uses if not use.lookup]
    zeros = [mx.zeros(i.shape, i.dtype) for i in seen]
    values, gradients = mx.vjp(probed, [*inputs, *offsets], [*cotangents, *zeros])
    products = iter(values[len(cotangents) :])
    for use, gradient in zip(uses, gradients[len(inputs) :], strict=True):
        met = use if use.lookup else Use(use.path, next(products), use.indices, gradient)
        # A layer that also runs elsewhere, out of this stretch's reach, shows no gradient here;
        # where gradients overflow, the tensor is better measured directly.
        if 0 < float(mx.abs(gradient.astype(mx.float32)).sum()) < math.inf:
            shape = tuple(modules[use.path]["weight"].shape)
            found[use.path].add(met, gradient, shape, across=use.path in across)
    mx.eval(gradients[: len(inputs)])
    return gradients[: len(inputs)]
