"""Distillation of a refined model: the codes stay, the grids move to where the logits agree.

End-to-end tuning of step sizes is the second phase of EfficientQAT (Chen et al., arXiv 2407.11062);
the loss is KL(reference || model), as in mlx-lm's DWQ.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from ...errors import InputError
from ...model.layers import (
    arrays,
    calls_replaced,
    decoder_layers,
    layer_index,
    quantizable,
    with_arrays,
)
from ...model.replay import record
from ..precision import Precision
from ..sensitivity.problem import Problem
from .feedback import Quantized
from .refinement import Refined

#: Updates, and the largest move of one, as a share of the group's scale.
STEPS, RATE = 48, 3e-3
#: Sequences of one update.
DRAWN = 8
#: Decay of the gradients' mean and of their mean square.
DECAY, SQUARE_DECAY = 0.9, 0.95

Offsets = list[mx.array]


def distill(
    problem: Problem,
    precisions: dict[str, Precision],
    refined: Refined,
    *,
    steps: int = STEPS,
    rate: float = RATE,
    checkpoint: bool = True,
) -> Refined:
    """Tune the scales and biases of refined tensors on the calibration sequences.

    A move is measured in its group's own scale, so that one rate suits every width. The rate warms
    up over a tenth of the steps and then falls to zero along a cosine. A step runs the reference
    and the quantized model on a few sequences. Beside the model it holds the layers' inputs and one
    layer's dequantized weights and activations, which are computed once more for the gradients.

    Args:
        problem: The problem that was planned; its model is left as it was.
        precisions: The plan's precision of each refined tensor.
        refined: From `refine`.
        steps: Updates to make.
        rate: The largest rate.
        checkpoint: Whether a layer's activations are computed once more for the gradients instead
            of kept.

    Returns:
        The same codes with new scales and biases, in the dtype they came in.

    Raises:
        InputError: ``steps`` is below 1 or ``rate`` not above 0.
    """
    if steps < 1 or not rate > 0:
        raise InputError(
            f"cannot distill in {steps} steps at a rate of {rate:g}: give at least one step and a "
            "rate above 0"
        )
    model = problem.model
    modules = {path: m for path, m in quantizable(model) if path in refined}
    grids = {path: _Movable.of(refined[path], precisions[path]) for path in modules}
    originals = {path: module.weight for path, module in modules.items()}
    offsets = {
        path: [mx.zeros(g.centre.shape), mx.zeros(g.centre.shape)] for path, g in grids.items()
    }
    adam = _Adam({path: [mx.zeros_like(o) for o in pair] for path, pair in offsets.items()})

    def put(offsets: dict[str, Offsets]) -> None:
        for path, pair in offsets.items():
            modules[path].weight = grids[path].weight(pair).astype(problem.dtype)

    inside = _inside(model, modules, problem.calibration.refining) if checkpoint else []

    def loss(offsets: dict[str, Offsets], tokens: mx.array, target: mx.array) -> mx.array:
        def call(index: int, original: Any, args: tuple, kwargs: dict) -> Any:
            return _recomputed(
                put, {path: offsets[path] for path in inside[index]}, original, args, kwargs
            )

        within = {path for own in inside for path in own}
        put({path: pair for path, pair in offsets.items() if path not in within})
        with calls_replaced(decoder_layers(model) if inside else [], call):
            logits = model(tokens).astype(mx.float32)
        # Short of the target's own entropy, which nothing here changes, this is the KL divergence.
        return (mx.logsumexp(logits, axis=-1) - (target * logits).sum(axis=-1)).mean()

    gradient, training = mx.grad(loss), getattr(model, "training", False)
    model.train()  # where a fused kernel has no gradient, mlx-lm trains without it
    try:
        numbers = tqdm(range(steps), desc="Distilling", disable=not problem.progress)
        for step, tokens in zip(numbers, _drawn(problem.calibration.refining), strict=False):
            target = mx.softmax(model(tokens).astype(mx.float32), axis=-1)
            mx.eval(target)
            gradients = gradient(offsets, tokens, target)
            offsets = adam.moved(offsets, gradients, rate * _pace(step, steps))
            mx.eval(offsets, adam.means, adam.squares)
            for path, weight in originals.items():
                modules[path].weight = weight
    finally:
        model.train(training)
        for path, weight in originals.items():
            modules[path].weight = weight
    tuned = {path: grid.stored(offsets[path]) for path, grid in grids.items()}
    mx.eval(tuned)
    return {**refined, **tuned}


def _inside(
    model: nn.Module, modules: dict[str, nn.Module], sequences: np.ndarray
) -> list[list[str]]:
    """Paths by decoder layer; empty if the layers hand each other more than arrays."""
    if not record(model, mx.array(sequences[:1]))[1]:
        return []
    index = layer_index(model)
    return [
        [path for path in modules if index.get(path) == number]
        for number in range(len(decoder_layers(model)))
    ]


def _recomputed(
    put: Callable[[dict[str, Offsets]], None],
    offsets: dict[str, Offsets],
    original: Any,
    args: tuple,
    kwargs: dict,
) -> Any:
    """A layer's output, of which nothing is kept for the backward pass but what came in.

    Args:
        put: Puts the layer's weights in.
        offsets: Of the layer's own tensors.
        original: Calls the layer.
        args: What it is called with.
        kwargs: What it is called with by name.
    """
    returned: list[Any] = []

    def run(offsets: dict[str, Offsets], given: list[mx.array]) -> list[mx.array]:
        put(offsets)
        new_args, new_kwargs = with_arrays((args, kwargs), given)
        output = original(*new_args, **new_kwargs)
        returned.append(output)
        return arrays(output)

    outputs = mx.checkpoint(run)(offsets, arrays((args, kwargs)))
    return with_arrays(returned[0], outputs)


def _drawn(sequences: np.ndarray) -> Iterator[mx.array]:
    """Batches of sequences without end, each sequence once before any comes again."""
    rng, queue = np.random.default_rng(0), np.zeros(0, np.int64)
    while True:
        while len(queue) < min(DRAWN, len(sequences)):
            queue = np.concatenate([queue, rng.permutation(len(sequences))])
        yield mx.array(sequences[queue[:DRAWN]])
        queue = queue[DRAWN:]


def _pace(step: int, steps: int) -> float:
    """Share of the largest rate at a step, counted from 0."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


@dataclass(frozen=True)
class _Movable:
    """A quantized tensor whose grids can move.

    A grid's centre and its width move apart from each other, as scale and bias would not.

    Attributes:
        quantized: What is stored.
        precision: How.
        scale: Scales in float32, (..., groups).
        centre: Value of the middle of each grid, (..., groups).
    """

    quantized: Quantized
    precision: Precision
    scale: mx.array
    centre: mx.array

    @classmethod
    def of(cls, quantized: Quantized, precision: Precision) -> "_Movable":
        scale, bias = (a.astype(mx.float32) for a in quantized[1:])
        return cls(quantized, precision, scale, bias + scale * cls._middle(precision))

    @staticmethod
    def _middle(precision: Precision) -> float:
        return (2**precision.bits - 1) / 2

    def _at(self, offsets: Offsets) -> tuple[mx.array, mx.array]:
        unit = mx.abs(self.scale)
        width, centre = offsets
        return self.scale + width * unit / self._middle(self.precision), self.centre + centre * unit

    def weight(self, offsets: Offsets) -> mx.array:
        """The weight (..., out, in) in float32."""
        scale, centre = self._at(offsets)
        codes = mx.dequantize(
            self.quantized[0],
            mx.ones_like(self.scale),
            mx.zeros_like(self.scale),
            group_size=self.precision.group_size,
            bits=self.precision.bits,
        )
        grouped = mx.unflatten(codes, -1, (-1, self.precision.group_size))
        from_middle = grouped - self._middle(self.precision)
        return (from_middle * scale[..., None] + centre[..., None]).flatten(-2, -1)

    def stored(self, offsets: Offsets) -> Quantized:
        """What to store; the bias makes up for the scale's rounding."""
        dtype = self.quantized[1].dtype
        scale, centre = self._at(offsets)
        scale = scale.astype(dtype)
        bias = centre - scale.astype(mx.float32) * self._middle(self.precision)
        return self.quantized[0], scale, bias.astype(dtype)


@dataclass
class _Adam:
    """Adam (Kingma and Ba, arXiv 1412.6980) with one second moment for all groups of a tensor.

    A moment for every group would move those that matter least as far as the others.
    """

    means: dict[str, Offsets]
    squares: dict[str, Offsets] = field(default_factory=dict)
    count: int = 0

    def moved(
        self, values: dict[str, Offsets], gradients: dict[str, Offsets], rate: float
    ) -> dict[str, Offsets]:
        """The values after one step."""
        self.count += 1
        result = {}
        for path, pair in gradients.items():
            squares = self.squares.get(path, [mx.array(0.0)] * len(pair))
            self.means[path] = [
                DECAY * m + (1 - DECAY) * g for m, g in zip(self.means[path], pair, strict=True)
            ]
            self.squares[path] = [
                SQUARE_DECAY * s + (1 - SQUARE_DECAY) * mx.mean(mx.square(g))
                for s, g in zip(squares, pair, strict=True)
            ]
            result[path] = [
                value - rate * self._direction(mean, square)
                for value, mean, square in zip(
                    values[path], self.means[path], self.squares[path], strict=True
                )
            ]
        return result

    def _direction(self, mean: mx.array, square: mx.array) -> mx.array:
        mean, square = mean / (1 - DECAY**self.count), square / (1 - SQUARE_DECAY**self.count)
        return mean / (mx.sqrt(square) + 1e-12)
