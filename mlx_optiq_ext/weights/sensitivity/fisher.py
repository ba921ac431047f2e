"""Backward passes that gather every tensor's `Factors`, one decoder layer at a time."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from ... import distributed
from ...model.layers import arrays, decoder_layers, quantizable, with_arrays
from ...model.layerwise import recordings
from ...model.replay import Recording, joined, replaced
from ...model.spill import Spill
from ...model.stream import Stream
from ...planning.parts import Parts
from .backward import GradientError, gather, told_apart
from .draws import Drawn, rows_together, score, sequences
from .head import Head
from .moments import Factors
from .relay import Block, once, relayed

#: Bytes of gradients at the logits that are kept; beyond that they are computed twice.
KEPT = 2**28


def factors(
    model: nn.Module,
    batches: list[mx.array],
    *,
    draws: int = 1,
    across: Collection[str] = (),
    stream: Stream | None = None,
    parts: Parts | None = None,
    spill: Spill | None = None,
) -> Iterator[dict[str, Factors]]:
    """Measure the factors of every quantizable tensor with one backward pass a sequence.

    The decoder layers' inputs are stored and one layer at a time is run again and differentiated,
    for all sequences before the layer before it, so that memory holds the model, the hidden states,
    and one layer's activations and moments. A model whose layers cannot be replayed is
    differentiated as a whole.

    Each process of ``mlx.launch`` takes consecutive sequences. It adds their part of a layer's sums
    to those that the process before passed on, while that one works on the next layer. So the sums
    are those of one process, bit for bit. A model whose layers cannot be replayed, or that runs
    some of them more than once, is differentiated by every process.

    Args:
        model: An mlx-lm model; not changed.
        batches: Token batches, int32 (batch, length).
        draws: Number of gradients that are drawn at the logits of each batch.
        across: Paths whose whole output moment is wanted.
        stream: The model's stream, if its layers are on disk.
        parts: How to run the model with a chunk of a sequence's logits at a time, which is done
            where those of a batch are many; None for all at once.
        spill: Where to keep the hidden states between the layers; None keeps them in memory.

    Yields:
        The factors of each decoder layer, the last one first, then of the modules around them;
        equal in all processes.

    Raises:
        GradientError: MLX has no gradient for an operation of the model, or its layers are on disk
            and cannot be replayed.
    """
    modules = dict(quantizable(model))
    head = Head.of(parts, batches, draws)
    together = head.together(batches[0].shape[1]) if head else rows_together(model, batches)
    every, tokens = sequences(batches, together), draws * sum(batch.size for batch in batches)
    own = distributed.span(every)
    parted = 0 < min(distributed.gathered(len(own))) < len(every)
    training = getattr(
        model, "training", False
    )  # recurrent_gemma does not call nn.Module's __init__
    model.train()  # in training mode mlx-lm avoids fused kernels that have no gradient
    try:
        own = own if parted else every
        recorded = recordings(model, [sequence.tokens for sequence in own], stream, spill)
        if parted and not (all(recorded) and once(recorded[0])):
            parted, own = False, every
            recorded = recordings(model, [sequence.tokens for sequence in own], stream, spill)
        with told_apart():
            if all(recorded):
                walk = _Walk(model, own, recorded, draws, across, stream, head)
                blocks = walk.blocks(modules)
                yield from relayed(blocks, tokens) if parted else walk.run(blocks, tokens)
            elif stream is not None:
                raise GradientError("its layers do not run one by one")
            else:
                yield _whole(model, modules, batches, draws, across, tokens)
    finally:
        model.train(training)


def _whole(
    model: nn.Module,
    modules: dict[str, nn.Module],
    batches: list[mx.array],
    draws: int,
    across: Collection[str],
    tokens: int,
) -> dict[str, Factors]:
    """The factors of a model that is differentiated in one piece."""
    found = {path: Factors(tokens=tokens) for path in modules}
    for number, batch in enumerate(batches):
        logits = model(batch)
        for draw in range(draws):
            cotangent = score(logits, mx.random.key(number * draws + draw))
            for sequence, pulled in zip(batch[:, None], cotangent[:, None], strict=True):
                gather(modules, lambda t=sequence: [model(t)], [], [pulled], found, across)
    return found


class _Walk:
    """Goes through the layers from last to first, and for each through all sequences and draws."""

    def __init__(
        self,
        model: nn.Module,
        sequences: list[Drawn],
        recorded: list[Recording],
        draws: int,
        across: Collection[str],
        stream: Stream | None,
        head: Head | None,
    ):
        self.model, self.sequences, self.recorded = model, sequences, recorded
        self.draws, self.across, self.stream, self.head = draws, across, stream, head
        # For each sequence and draw: the known gradients at each call's inputs.
        calls = len(recorded[0])
        self.pulled: dict[tuple[int, int], list[list[mx.array]]] = {
            (sequence, draw): [[] for _ in range(calls)]
            for sequence in range(len(sequences))
            for draw in range(draws)
        }
        self.scores: dict[tuple[int, int], mx.array] = {}

    def run(self, blocks: list[Block], tokens: int) -> Iterator[dict[str, Factors]]:
        """Yield the factors of each block once all its calls are differentiated."""
        ran = [call.index for call in self.recorded[0]]
        numbers = [*reversed(range(len(ran))), None]
        found: dict[int | None, dict[str, Factors]] = {}
        for number, (paths, add) in zip(numbers, blocks, strict=True):
            index = None if number is None else ran[number]
            if index not in found:
                found[index] = {path: Factors(tokens=tokens) for path in paths}
            add(found[index])
            if index not in ran[:number]:  # a model may run its layers more than once
                yield found.pop(index)

    def blocks(self, modules: Mapping[str, nn.Module]) -> list[Block]:
        """Each call, the last one first, then the modules around the layers.

        They must be differentiated in this order.
        """
        layers = decoder_layers(self.model)
        inside = {id(m): i for i, layer in enumerate(layers) for m in layer.modules()}
        ran = [call.index for call in self.recorded[0]]
        found: list[Block] = []
        for number in reversed(range(len(ran))):
            index = ran[number]
            own = {path: m for path, m in modules.items() if inside.get(id(m)) == index}
            found.append((list(own), partial(self.layer, number, layers[index], own)))
        outer = {path: m for path, m in modules.items() if id(m) not in inside}
        # Layers that never ran have no gradient.
        idle = {path: i for path, m in modules.items() if (i := inside.get(id(m))) is not None}
        rest = [*outer, *(path for path, i in idle.items() if i not in ran)]
        return [*found, (rest, partial(self.around, outer))]

    def layer(
        self,
        number: int,
        layer: nn.Module,
        own: dict[str, nn.Module],
        found: dict[str, Factors],
    ) -> None:
        """Differentiate one call for all sequences."""
        index = self.recorded[0][number].index
        with self.stream.layer(index) if self.stream else nullcontext():
            for sequence in range(len(self.sequences)):
                self.call(number, layer, own, sequence, found)

    def call(
        self,
        number: int,
        layer: nn.Module,
        own: dict[str, nn.Module],
        sequence: int,
        found: dict[str, Factors],
    ) -> None:
        """Differentiate one call for one sequence and all its draws."""
        own_sequence, recording = self.sequences[sequence], self.recorded[sequence]
        call = recording[number]

        def after(*outputs: mx.array) -> list[mx.array]:
            handed, logits = self.joined(sequence, {number: list(outputs)})
            return [*logits, *_flat(handed[number + 1 :])]

        def run(*inputs: mx.array) -> list[mx.array]:
            args, kwargs = with_arrays((call.args, call.kwargs), list(inputs))
            return [array + 0 for array in arrays(layer(*args, **kwargs))]

        inputs = arrays((call.args, call.kwargs))
        for draw, cotangent in enumerate(self.cotangents(sequence)):
            pulled = self.pulled[sequence, draw]
            later, outputs = [*cotangent, *_flat(pulled[number + 1 :])], arrays(call.output)
            if self.head is not None and number + 1 == len(recording):
                hidden = self.head.pulled(own_sequence, outputs[0], draw)
                gradients = [hidden, *map(mx.zeros_like, outputs[1:])]
            else:
                _, gradients = mx.vjp(after, outputs, later)
            pulled[number] = gather(own, run, inputs, gradients, found, self.across)
            following = number + 1
            if following < len(pulled) and recording[following].follows:
                # Only this call's output was used. Zeros take no memory until they are evaluated.
                hidden = pulled[following][0]
                pulled[following][0] = mx.zeros(hidden.shape, hidden.dtype)

    def around(self, outer: dict[str, nn.Module], found: dict[str, Factors]) -> None:
        """Differentiate the modules around the layers."""
        for number, sequence in enumerate(self.sequences):
            self.outside(outer, number, sequence, found)

    def outside(
        self,
        outer: dict[str, nn.Module],
        number: int,
        sequence: Drawn,
        found: dict[str, Factors],
    ) -> None:
        """Differentiate the modules around the layers for some sequences and all their draws."""

        def run() -> list[mx.array]:
            handed, logits = self.joined(number, {})
            return [*logits, *_flat(handed)]

        for draw, cotangent in enumerate(self.cotangents(number)):
            cotangents = [*cotangent, *_flat(self.pulled[number, draw])]
            gather(outer, run, [], cotangents, found, self.across)
            if self.head is not None:
                hidden = self.recorded[number][-1].hidden_out
                self.head.gather(outer, sequence, hidden, draw, found)

    def joined(
        self, sequence: int, outputs: dict[int, list[mx.array]]
    ) -> tuple[list[list[mx.array]], list[mx.array]]:
        """What `joined` finds, the logits in a list; without them if they are made in chunks."""
        tokens, recording = self.sequences[sequence].tokens, self.recorded[sequence]
        if self.head is None:
            handed, logits = joined(self.model, tokens, recording, outputs)
            return handed, [logits]
        handed, call = replaced(recording, outputs)
        self.head.parts.body(tokens, call)
        return handed, []

    def cotangents(self, sequence: int) -> list[list[mx.array]]:
        """Gradients at the logits for each draw; not evaluated, as most layers do not need them.

        They are as wide as the vocabulary, so only a few are kept. None if they are made in chunks.
        """
        if self.head is not None:
            return [[] for _ in range(self.draws)]
        keys = [(sequence, draw) for draw in range(self.draws)]
        if keys[0] in self.scores:
            return [[self.scores[key]] for key in keys]
        own = self.sequences[sequence]
        _, logits = joined(self.model, own.tokens, self.recorded[sequence], {})
        seeds = [mx.random.key(own.batch * self.draws + draw) for draw in range(self.draws)]
        found = [own.score(logits, seed) for seed in seeds]
        if self.stream is None and logits.nbytes * len(self.pulled) <= KEPT:
            self.scores |= dict(zip(keys, found, strict=True))
        return [[one] for one in found]


def _flat(lists: Iterable[list[mx.array]]) -> list[mx.array]:
    return [array for part in lists for array in part]
