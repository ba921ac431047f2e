"""Sensitivity of detections to errors of the weights: curvature measured on a few images.

The detection error is a KL divergence of class probabilities and an overlap error of boxes. Its
Hessian in the outputs is close to diagonal; gradients drawn with that Hessian as covariance have
the Hessian in the weights as second moment, whose diagonal predicts the effect of a rounding error.
Source: Martens, "New insights and perspectives on the natural gradient method" (2020), section 5.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..model.taps import Use, tapped
from .divergence import EDGE, confidence, scale
from .images import Picture
from .network import Layer, Outputs, outputs

#: 1 - IoU grows linearly with a box's shift, its approximation with the square: equal at one per
#: cent.
BOX_WEIGHT = 100.0

#: Smaller boxes count as this many pixels wide.
LEAST_SIDE = 4.0


@dataclass(frozen=True)
class Measured:
    """Measurements on the calibration images, by layer path.

    Attributes:
        curvature: Second derivatives of the detection error, shaped as the weight.
        inputs: (channels,) mean input; absent for a layer that inference does not use.
    """

    curvature: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]

    def unused(self, path: str) -> bool:
        """Whether a layer affects no detection, because only training uses it."""
        return path not in self.inputs


def measure(
    model: Any,
    found: Sequence[Layer],
    pictures: Sequence[Picture],
    *,
    draws: int = 2,
    seed: int = 0,
) -> Measured:
    """Measure curvature and mean inputs.

    Args:
        model: An exposed network.
        found: Its layers, including those that inference does not use.
        pictures: Calibration images.
        draws: Random gradients for each image.
        seed: Seed of the draws.
    """
    modules = {layer.path: layer.module for layer in found}
    weights = {path: module.weight for path, module in modules.items()}
    squares = {path: mx.zeros(weight.shape) for path, weight in weights.items()}
    count = draws * len(pictures)

    def projected(values: dict[str, mx.array], pixels: mx.array, key: mx.array) -> mx.array:
        for path, value in values.items():
            modules[path].weight = value
        return _projection(outputs(model, pixels), key)

    gradient = mx.grad(projected)
    keys = mx.random.split(mx.random.key(seed), count)
    try:
        for index, picture in enumerate(pictures):
            for draw in range(draws):
                slopes = gradient(weights, picture.pixels, keys[index * draws + draw])
                # Half, from the second-order term of the Taylor series.
                squares = {p: s + mx.square(slopes[p]) / (2 * count) for p, s in squares.items()}
                mx.eval(squares)
    finally:
        for path, weight in weights.items():
            modules[path].weight = weight
    inputs = _mean_inputs(model, modules, pictures)
    return Measured({path: np.array(s) for path, s in squares.items()}, inputs)


def _projection(out: Outputs, key: mx.array) -> mx.array:
    """A random sum of outputs whose gradient's second moment is the error's Hessian."""
    signs = mx.random.split(key, 4)
    p = mx.clip(mx.stop_gradient(out.scores), EDGE, 1 - EDGE)
    total = (_signs(signs[0], p.shape) * out.scores * mx.rsqrt(p * (1 - p))).sum()
    weight = mx.stop_gradient(mx.sqrt(2 * confidence(out)))[:, None]
    sides = mx.maximum(mx.stop_gradient(out.boxes[:, 2:]), LEAST_SIDE)
    shifts = out.boxes / mx.concatenate([sides, sides], axis=1)
    total = total + (_signs(signs[1], shifts.shape) * weight * shifts).sum() * BOX_WEIGHT**0.5
    columns = out.extra.shape[-1]
    if columns:
        relative = out.extra / mx.stop_gradient(scale(out.extra)) / columns**0.5
        total = total + (_signs(signs[2], relative.shape) * weight * relative).sum()
    if out.masks is not None:
        size = mx.stop_gradient(mx.sqrt(mx.square(out.masks).sum()))
        total = total + (_signs(signs[3], out.masks.shape) * out.masks).sum() * 2**0.5 / size
    return total


def _signs(key: mx.array, shape: tuple[int, ...]) -> mx.array:
    return mx.random.bernoulli(0.5, shape, key=key) * 2.0 - 1.0


def _mean_inputs(model: Any, modules: dict[str, Any], pictures: Sequence[Picture]):
    sums: dict[str, mx.array] = {}

    def tap(use: Use) -> mx.array:
        value = use.inputs.reshape(-1, use.inputs.shape[-1]).mean(0) / len(pictures)
        sums[use.path] = sums[use.path] + value if use.path in sums else value
        return use.outputs

    with tapped(modules, tap):
        for picture in pictures:
            mx.eval(outputs(model, picture.pixels).arrays())
            mx.eval(sums)
    return {path: np.array(value) for path, value in sums.items()}
