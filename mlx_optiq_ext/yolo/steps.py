"""Chooses each layer's step for the least detection error within the file's budget."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import BudgetError, InputError
from ..planning.allocation import allocate
from . import archive
from .codes import RULES, channel_steps, encoded
from .divergence import Divergence, divergence, mean
from .hessian import Measured
from .images import Picture
from .network import Layer, Outputs, outputs
from .reading.naming import canonical, ultralytics

#: Steps to choose from, relative to the spread of a layer's weight.
FACTORS = tuple(math.exp(exponent / 4) for exponent in range(-20, 5))

#: Least range of a protected layer's codes, that of 8 bits.
PROTECTED_LEVELS = 127

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Choice:
    """The choice for one layer.

    Attributes:
        factor: Step relative to the spread of the weight; 0 if only zeros are stored, because no
            detection depends on the layer.
        bits: Stored bits per weight, including normalization and file headers.
        error: Expected detection error that its rounding adds.
    """

    factor: float
    bits: float
    error: float


@dataclass(frozen=True)
class DetectionPlan:
    """Every layer's choice.

    Attributes:
        rule: Rule by which channels share a layer's step.
        choices: Layer path -> choice.
        file_bytes: Size of the file.
        parameters: Number of parameters that the bits are counted over.
        error: Detection error on the images kept for judging, or None before judging.
    """

    rule: str
    choices: dict[str, Choice]
    file_bytes: int
    parameters: int
    error: Divergence | None = None

    @property
    def bits_per_weight(self) -> float:
        """All bits of the file over all parameters."""
        return self.file_bytes * 8 / self.parameters


@dataclass(frozen=True)
class Detector:
    """The input of planning.

    Attributes:
        layers: Every layer, including those that only training uses.
        arrays: All parameters of the network by name, float32.
        measured: Sensitivity of detections to errors of the layers.
        protected: Paths of layers that keep at least 8 bits' steps.
    """

    layers: tuple[Layer, ...]
    arrays: Arrays
    measured: Measured
    protected: frozenset[str] = frozenset()

    @property
    def parameters(self) -> int:
        """Number of parameters, without the strides that yolo-mlx lists among them."""
        return sum(a.size for name, a in self.arrays.items() if not name.endswith("stride"))

    def own(self, layer: Layer) -> Arrays:
        """The arrays of a layer and of its normalization."""
        paths = (layer.path, layer.norm_path)
        return {n: a for n, a in self.arrays.items() if n.rpartition(".")[0] in paths and "." in n}


def file_name(name: str) -> str:
    """The name under which an array is stored: Ultralytics', which is shorter and read by all."""
    return ultralytics(canonical(name))


def plan(detector: Detector, budget: float, rule: str) -> tuple[DetectionPlan, Arrays]:
    """Choose steps within a budget.

    Args:
        detector: The network and what was measured.
        budget: Bits of the file per parameter.
        rule: One of ``codes.RULES``.

    Returns:
        The plan and the arrays of its file by the network's names.

    Raises:
        BudgetError: Even the coarsest steps take more.
        InputError: A weight or a sensitivity is no finite number; the message names the layer.
    """
    _check_finite(detector)
    errors, sizes, factors = [], [], []
    for layer in detector.layers:
        rows = _candidates(detector, layer, rule)
        errors.append([row[1] for row in rows])
        sizes.append([row[2] for row in rows])
        factors.append([row[0] for row in rows])
    rest = {name: _small(array) for name, array in _others(detector).items()}
    fixed = archive.END_BYTES + sum(archive.entry_bytes(file_name(n), a) for n, a in rest.items())
    capacity = math.floor(budget * detector.parameters / 8) - fixed
    least = fixed + sum(min(row) for row in sizes)
    if least - fixed > capacity:
        raise BudgetError(
            f"a budget of {budget:g} bits per weight is too small for this network: its coarsest "
            f"file takes {least * 8 / detector.parameters:.2f}"
        )
    names = [layer.path for layer in detector.layers]
    picks = allocate(errors, sizes, capacity, names=names)
    stored, choices = dict(rest), {}
    for layer, pick, error, size, factor in zip(
        detector.layers, picks, errors, sizes, factors, strict=True
    ):
        stored |= _storing(detector, layer, rule)(factor[pick])[0]
        elements = detector.arrays[f"{layer.path}.weight"].size
        choices[layer.path] = Choice(factor[pick], size[pick] * 8 / elements, error[pick])
    total = fixed + sum(size[pick] for size, pick in zip(sizes, picks, strict=True))
    return DetectionPlan(rule, choices, total, detector.parameters), stored


def _check_finite(detector: Detector) -> None:
    for name, array in detector.arrays.items():
        if not np.isfinite(array).all():
            raise InputError(f"{name} holds numbers that are not finite: get the checkpoint again")
    for path, array in detector.measured.curvature.items():
        if not np.isfinite(array).all():
            raise InputError(
                f"the sensitivity of {path} is not finite: weights up to there are too large to "
                "compute with"
            )


def _candidates(detector: Detector, layer: Layer, rule: str) -> list[tuple[float, float, int]]:
    """(factor, expected detection error, bytes) of each way to store a layer."""
    if detector.measured.unused(layer.path):
        options: Sequence[float] = (0.0,)
    elif layer.path in detector.protected:
        options = [f for f in FACTORS if f <= _protecting_factor(detector, layer, rule)] or FACTORS[
            :1
        ]
    else:
        options = FACTORS
    curvature, found = detector.measured.curvature[layer.path], []
    store = _storing(detector, layer, rule)
    for factor in options:
        stored = store(factor)
        if stored is not None:
            arrays, error = stored
            size = sum(archive.entry_bytes(file_name(n), a) for n, a in arrays.items())
            found.append((factor, float((curvature * np.square(error)).sum()), size))
    return found


def _protecting_factor(detector: Detector, layer: Layer, rule: str) -> float:
    """The coarsest factor at which every channel's codes reach as far as 8-bit ones do."""
    weight = detector.arrays[f"{layer.path}.weight"]
    steps = channel_steps(weight, detector.measured.curvature[layer.path], rule)
    reach = np.abs(weight.reshape(len(weight), -1)).max(1)
    return float(np.min(reach[reach > 0] / steps[reach > 0], initial=np.inf)) / PROTECTED_LEVELS


def _storing(detector: Detector, layer: Layer, rule: str) -> Callable[[float], Any]:
    """A function from a factor to a layer's stored arrays and its rounding error."""
    own = detector.own(layer)
    weight = own[f"{layer.path}.weight"]
    if detector.measured.unused(layer.path):
        # Ones, because a variance must stay positive.
        blank = {
            name: np.full(a.shape, name.endswith("running_var"), np.int8) for name, a in own.items()
        }
        return lambda _: (blank, np.zeros_like(weight))
    steps = channel_steps(weight, detector.measured.curvature[layer.path], rule)
    inputs = detector.measured.inputs[layer.path]
    return lambda factor: encoded(layer, own, factor * steps, inputs)


def _others(detector: Detector) -> Arrays:
    """Arrays that belong to no layer, such as strides."""
    taken = {name for layer in detector.layers for name in detector.own(layer)}
    return {name: array for name, array in detector.arrays.items() if name not in taken}


def _small(array: np.ndarray) -> np.ndarray:
    """Half precision where it holds the values exactly."""
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.array_equal(half, array) else array


def judge(
    model: Any, stored: Mapping[str, np.ndarray], references: Sequence[tuple[Picture, Outputs]]
) -> Divergence:
    """Detection error of a file's arrays.

    Args:
        model: An exposed network, left with these arrays.
        stored: Arrays by the network's names, as the file holds them.
        references: Images, each with the original network's outputs.
    """
    fill(model, stored)
    found = []
    for picture, reference in references:
        out = outputs(model, picture.pixels)
        mx.eval(out.arrays())
        found.append(divergence(reference, out))
    return mean(found)


def fill(model: Any, stored: Mapping[str, np.ndarray]) -> None:
    """Set the arrays that an exposed network still has."""
    reachable = dict(model.named_modules())
    for name, array in stored.items():
        path, _, attribute = name.rpartition(".")
        if path in reachable and attribute in reachable[path]:
            setattr(reachable[path], attribute, mx.array(array).astype(mx.float32))


def best(
    detector: Detector,
    budget: float,
    model: Any,
    references: Sequence[tuple[Picture, Outputs]],
) -> tuple[DetectionPlan, Arrays]:
    """Plan with every rule, and return the plan with the least judged error."""
    found = []
    for rule in RULES:
        candidate, stored = plan(detector, budget, rule)
        error = judge(model, stored, references)
        found.append((replace(candidate, error=error), stored))
    return min(found, key=lambda pair: pair[0].error.total)
