"""A convolution as integer codes; the step per output channel moves into the batch normalization.

``norm(conv(x, step * codes))`` equals ``norm'(conv(x, codes))`` with other numbers in the
normalization, so the runtime only needs integers in place of the weight. Codes have no fixed width:
the file stores their entropy. A rounding error shifts a channel's mean; the normalization's bias
corrects this.
Sources: Gish, Pierce, "Asymptotically efficient quantizing" (1968), for uniform steps before
entropy coding; Nagel et al., "Data-free quantization through weight equalization and bias
correction" (2019), for the mean.
"""

from collections.abc import Mapping

import numpy as np

from .network import Layer

#: How channels share a layer's step: by their curvature, or half by that and half by their spread.
RULES = ("curvature", "even")


def channel_steps(weight: np.ndarray, curvature: np.ndarray, rule: str) -> np.ndarray:
    """Steps of a layer's output channels (out,), relative to the spread of the whole weight.

    Args:
        weight: (out, ...).
        curvature: Shaped as ``weight``; how much a squared error adds to the detection error.
        rule: One of ``RULES``.
    """
    rows = weight.reshape(len(weight), -1).astype(np.float64)
    bends = curvature.reshape(len(weight), -1).astype(np.float64).mean(1)
    # Equal errors per code are best at high rates; the floor keeps out noise in small curvatures.
    steps = (bends + 0.01 * bends.mean() + 1e-30) ** -0.5
    if rule == "even":
        steps = np.sqrt(steps * np.maximum(rows.std(1), 1e-9))
    steps = np.maximum(steps, 1e-6 * steps.max())
    return steps / np.exp(np.log(steps).mean()) * max(rows.std(), 1e-12)


def quantized(weight: np.ndarray, steps: np.ndarray) -> np.ndarray | None:
    """Integer codes shaped as the weight, int8 or int16; None where they need more."""
    codes = np.rint(weight / _along(steps, weight))
    largest = np.abs(codes).max(initial=0)
    if largest > np.iinfo(np.int16).max:
        return None
    return codes.astype(np.int8 if largest <= np.iinfo(np.int8).max else np.int16)


def power_of_two(steps: np.ndarray) -> np.ndarray:
    """The nearest powers of two: half precision then holds codes times steps exactly."""
    return 2.0 ** np.rint(np.log2(steps))


def encoded(
    layer: Layer,
    arrays: Mapping[str, np.ndarray],
    steps: np.ndarray,
    inputs: np.ndarray,
) -> tuple[dict[str, np.ndarray], np.ndarray] | None:
    """A layer as the file stores it.

    Args:
        layer: The layer.
        arrays: Its own and its normalization's parameters by name.
        steps: (out,) step of each output channel.
        inputs: (channels,) mean input, for the correction of the mean.

    Returns:
        Arrays by name, and the rounding error of the weight; None if codes get too large.
    """
    weight = arrays[f"{layer.path}.weight"]
    if layer.norm is None:
        steps = power_of_two(steps)
    codes = quantized(weight, steps)
    if codes is None:
        return None
    error = codes * _along(steps, weight) - weight
    moved = mean_shift(error, inputs, layer)
    bias = arrays.get(f"{layer.path}.bias")
    if layer.norm is None:
        # Half precision holds 11 bits and its largest number is 65504.
        values = codes * _along(steps, weight)
        exact = np.array_equal(values.astype(np.float16).astype(np.float64), values)
        stored = {f"{layer.path}.weight": values.astype(np.float16 if exact else np.float32)}
        if bias is not None:
            stored[f"{layer.path}.bias"] = (bias - moved).astype(np.float32)
        return stored, error
    stored = {f"{layer.path}.weight": codes}
    if bias is not None:
        stored[f"{layer.path}.bias"] = np.zeros(bias.shape, np.float16)
    norm = {name: arrays[f"{layer.norm_path}.{name}"].astype(np.float64) for name in NORM}
    slope = norm["weight"] / np.sqrt(norm["running_var"] + layer.norm.eps)
    offset = norm["bias"] + slope * ((0 if bias is None else bias) - moved - norm["running_mean"])
    stored |= _normalization(layer, slope * steps, offset)
    return stored, error


#: The parameters of a batch normalization.
NORM = ("weight", "bias", "running_mean", "running_var")


def _normalization(layer: Layer, slope: np.ndarray, offset: np.ndarray) -> dict[str, np.ndarray]:
    """``slope * x + offset`` as a batch normalization: half precision, and constants beside it."""
    # The variance carries a common factor, so that half precision holds the slopes.
    factor = 2.0 ** np.floor(np.log2(max(np.abs(slope).max(), 1e-20)))
    variance = np.full(slope.shape, factor**-2 - layer.norm.eps, np.float32)
    return {
        f"{layer.norm_path}.weight": (slope / factor).astype(np.float16),
        f"{layer.norm_path}.bias": offset.astype(np.float16),
        f"{layer.norm_path}.running_mean": np.zeros(slope.shape, np.float16),
        f"{layer.norm_path}.running_var": variance,
    }


def mean_shift(error: np.ndarray, inputs: np.ndarray, layer: Layer) -> np.ndarray:
    """How far an error of the weight moves the mean of each output channel (out,)."""
    taps = error.reshape(len(error), -1, error.shape[-1]).sum(1)
    if layer.transposed:  # each output uses only some of the taps
        taps = taps / np.prod(layer.module.stride)
    groups = len(inputs) // taps.shape[1]
    each = np.repeat(inputs.reshape(groups, -1), len(error) // groups, axis=0)
    return (taps * each).sum(1)


def _along(steps: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return steps.reshape(-1, *[1] * (weight.ndim - 1))
