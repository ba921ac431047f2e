"""Backward passes that gather every tensor's `Factors`, one decoder layer at a time."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn

from .blocks import Recording, arrays, decoder_layers, joined, with_arrays
from .lockstep import recordings
from .moments import Factors
from .packing import quantizable
from .stream import Stream
from .taps import Use, tapped

#: Bytes of gradients at the logits that are kept rather than computed twice.
KEPT = 2**28


def score(logits: mx.array, key: mx.array) -> mx.array:
    """A random gradient at the logits whose covariance is the KL divergence's Hessian there.

    With ``p`` the probabilities that is ``diag(p) - p p^T``, and random signs times
    ``diag(sqrt p) - p sqrt(p)^T`` are one draw. Tokens drawn from the model have the same
    covariance, but where it is sure of itself nearly all of their gradients are next to nothing
    and a few are huge.

    Args:
        logits: (batch, length, vocabulary).
        key: For the draw.

    Returns:
        Of the same shape and dtype.
    """
    probabilities = mx.softmax(logits.astype(mx.float32), axis=-1)
    signs = mx.where(mx.random.bernoulli(0.5, logits.shape, key=key), 1.0, -1.0)
    signed = mx.sqrt(probabilities) * signs
    return (signed - probabilities * signed.sum(axis=-1, keepdims=True)).astype(logits.dtype)


def factors(
    model: nn.Module,
    batches: list[mx.array],
    *,
    draws: int = 1,
    across: Collection[str] = (),
    stream: Stream | None = None,
) -> Iterator[dict[str, Factors]]:
    """Measure the factors of every quantizable tensor with one backward pass a batch.

    The decoder layers' inputs are stored and one layer at a time is run again and differentiated,
    for all batches before the layer before it, so that memory holds the model, the hidden states,
    and one layer's activations and moments. A model whose layers cannot be replayed is
    differentiated as a whole, one window at a time.

    Args:
        model: An mlx-lm model; left as it was.
        batches: Token batches, int32 (batch, length).
        draws: How many gradients are drawn at the logits of each batch.
        across: Paths whose whole output moment is wanted.
        stream: Of the model, if its layers are on disk.

    Yields:
        The factors of each decoder layer, the last one first, then of what is around them.

    Raises:
        ValueError: The layers are on disk and cannot be replayed.
    """
    modules = dict(quantizable(model))
    tokens = draws * sum(batch.size for batch in batches)
    training = getattr(model, "training", False)  # recurrent_gemma skips nn.Module's set-up
    model.train()  # where a fused kernel has no gradient, mlx-lm trains without it
    try:
        recorded = recordings(model, batches, stream)
        if all(recorded):
            walk = _Walk(model, batches, recorded, draws, across, stream)
            yield from walk.layers(modules, tokens)
        elif stream is not None:
            raise ValueError("its layers do not run one by one")
        else:
            found = {path: Factors(tokens=tokens) for path in modules}
            for number, batch in enumerate(batches):
                logits = model(batch)
                for draw in range(draws):
                    cotangent = score(logits, mx.random.key(number * draws + draw))
                    for window, pulled in zip(batch[:, None], cotangent[:, None], strict=True):
                        _gather(modules, lambda t=window: [model(t)], [], [pulled], found, across)
            yield found
    finally:
        model.train(training)


class _Walk:
    """Layers from the last to the first, and for each all batches and draws."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[mx.array],
        recorded: list[Recording],
        draws: int,
        across: Collection[str],
        stream: Stream | None,
    ):
        self.model, self.batches, self.recorded = model, batches, recorded
        self.draws, self.across, self.stream = draws, across, stream
        # For each batch and draw: gradients at what each call was handed, as far as known.
        calls = len(recorded[0])
        self.pulled: dict[tuple[int, int], list[list[mx.array]]] = {
            (batch, draw): [[] for _ in range(calls)]
            for batch in range(len(batches))
            for draw in range(draws)
        }
        self.scores: dict[tuple[int, int], mx.array] = {}

    def layers(self, modules: Mapping[str, nn.Module], tokens: int) -> Iterator[dict[str, Factors]]:
        layers = decoder_layers(self.model)
        inside = {id(m): i for i, layer in enumerate(layers) for m in layer.modules()}
        ran = [call.index for call in self.recorded[0]]
        found: dict[int, dict[str, Factors]] = {}
        for number in reversed(range(len(ran))):
            index = ran[number]
            own = {path: m for path, m in modules.items() if inside.get(id(m)) == index}
            if index not in found:
                found[index] = {path: Factors(tokens=tokens) for path in own}
            with self.stream.layer(index) if self.stream else nullcontext():
                for batch in range(len(self.batches)):
                    self.call(number, layers[index], own, batch, found[index])
            if index not in ran[:number]:  # a model may run its layers more than once
                yield found.pop(index)
        outer = {path: m for path, m in modules.items() if id(m) not in inside}
        rest = {path: Factors(tokens=tokens) for path in outer}
        for batch in range(len(self.batches)):
            self.around(outer, batch, rest)
        # Layers that never ran had no gradient.
        idle = {path: i for path, m in modules.items() if (i := inside.get(id(m))) is not None}
        yield rest | {path: Factors(tokens=tokens) for path, i in idle.items() if i not in ran}

    def call(
        self,
        number: int,
        layer: nn.Module,
        own: dict[str, nn.Module],
        batch: int,
        found: dict[str, Factors],
    ) -> None:
        """Differentiate one call for one batch and all its draws."""
        model, tokens, recording = self.model, self.batches[batch], self.recorded[batch]
        call = recording[number]

        def after(*outputs: mx.array) -> list[mx.array]:
            handed, logits = joined(model, tokens, recording, {number: list(outputs)})
            return [logits, *_flat(handed[number + 1 :])]

        def run(*inputs: mx.array) -> list[mx.array]:
            args, kwargs = with_arrays((call.args, call.kwargs), list(inputs))
            return [array + 0 for array in arrays(layer(*args, **kwargs))]

        inputs = arrays((call.args, call.kwargs))
        for draw, cotangent in enumerate(self.cotangents(batch)):
            pulled = self.pulled[batch, draw]
            later = [cotangent, *_flat(pulled[number + 1 :])]
            _, gradients = mx.vjp(after, arrays(call.output), later)
            pulled[number] = _gather(own, run, inputs, gradients, found, self.across)
            following = number + 1
            if following < len(pulled) and recording[following].follows:
                # Only this call's output led there. Zeros take no memory until they are used.
                hidden = pulled[following][0]
                pulled[following][0] = mx.zeros(hidden.shape, hidden.dtype)

    def around(self, outer: dict[str, nn.Module], batch: int, found: dict[str, Factors]) -> None:
        """Differentiate what is around the layers."""
        model, tokens, recording = self.model, self.batches[batch], self.recorded[batch]

        def run() -> list[mx.array]:
            handed, logits = joined(model, tokens, recording, {})
            return [logits, *_flat(handed)]

        for draw, cotangent in enumerate(self.cotangents(batch)):
            cotangents = [cotangent, *_flat(self.pulled[batch, draw])]
            _gather(outer, run, [], cotangents, found, self.across)

    def cotangents(self, batch: int) -> list[mx.array]:
        """Gradients at the logits for each draw, not evaluated: most layers have no need of them.

        They are as wide as the vocabulary, so that few are kept.
        """
        keys = [(batch, draw) for draw in range(self.draws)]
        if keys[0] in self.scores:
            return [self.scores[key] for key in keys]
        _, logits = joined(self.model, self.batches[batch], self.recorded[batch], {})
        seeds = [mx.random.key(batch * self.draws + draw) for draw in range(self.draws)]
        found = [score(logits, seed) for seed in seeds]
        if self.stream is None and logits.nbytes * len(self.pulled) <= KEPT:
            self.scores |= dict(zip(keys, found, strict=True))
        return found


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
