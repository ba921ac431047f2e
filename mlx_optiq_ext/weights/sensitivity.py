"""How much each tensor costs in each packing, measured on the model itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from .blocks import Recording, layer_index, record, resume
from .calibration import Calibration
from .divergence import Reference
from .journal import Journal
from .packing import Packing, Tensor, dequantized, quantizable

#: Tensor path -> packing -> expected KL in nats per token when only that tensor is packed.
Sensitivity = dict[str, dict[Packing, float]]

#: Windows run at once.
BATCH = 4


@dataclass(frozen=True)
class Problem:
    """A model whose tensors are to be measured.

    Attributes:
        model: The model, with every parameter in the dtype to compute in.
        weights: Tensor path -> weight ``(..., out, in)`` in the dtype it is stored in.
        tensors: The tensors to measure, with their candidates.
        calibration: Token windows.
        key: What identifies the model and the dtype, for the journal.
        progress: Whether to show a progress bar.
    """

    model: nn.Module
    weights: dict[str, mx.array]
    tensors: tuple[Tensor, ...]
    calibration: Calibration
    key: dict[str, Any] = field(default_factory=dict)
    progress: bool = True

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype that products are computed in."""
        return quantizable(self.model)[0][1].weight.dtype

    @contextmanager
    def packed(self, choice: dict[str, Packing]) -> Iterator[None]:
        """The model with some tensors replaced by what a packing leaves of them."""
        modules = dict(quantizable(self.model))
        originals = {path: modules[path].weight for path in choice}
        try:
            for path, packing in choice.items():
                modules[path].weight = dequantized(self.weights[path], packing, self.dtype)
            yield
        finally:
            for path, weight in originals.items():
                modules[path].weight = weight


Method = Callable[[Problem], Sensitivity]


def batches(tokens: np.ndarray) -> list[mx.array]:
    """Windows (n, length) as batches of at most `BATCH`."""
    return [mx.array(tokens[i : i + BATCH]) for i in range(0, len(tokens), BATCH)]


def end_to_end(problem: Problem, choices: list[dict[str, Packing]]) -> list[float]:
    """KL(reference || plan) of whole plans on the held-out windows, in nats per token."""
    totals, count = [0.0] * len(choices), 0
    for batch in batches(problem.calibration.held_out):
        reference = Reference.of(problem.model(batch))
        for index, choice in enumerate(choices):
            with problem.packed(choice):
                divergence = reference.divergence(problem.model(batch))
                totals[index] += float(divergence.sum())
        count += batch.size
    return [total / count for total in totals]


def error(weight: mx.array, packing: Packing) -> float:
    """Summed squared error that a packing leaves in a weight ``(..., out, in)``."""
    if not packing.packed:
        return 0.0
    difference = weight.astype(mx.float32) - dequantized(weight, packing, mx.float32)
    return float(mx.square(difference).sum())


def kl(problem: Problem) -> Sensitivity:
    """Direct measurement: the KL of the final logits with one tensor packed at a time.

    Each tensor is probed at two coarse packings, with the layers before it replayed; the cost of
    the other candidates follows from their squared error on a power law through the probes, and
    rises in proportion to it beyond them.
    """
    journal = Journal(
        {**problem.key, "method": "kl", "tokens": problem.calibration.digest, "version": 1}
    )
    layers = layer_index(problem.model)
    anchors = {t.path: _anchors(t) for t in problem.tensors}
    missing = [
        (t, packing)
        for t in problem.tensors
        for packing in anchors[t.path]
        if journal.get(t.path, packing) is None
    ]
    if missing:
        data = [_Recorded.of(problem.model, b) for b in batches(problem.calibration.measured)]
        bar = tqdm(missing, desc="Measuring sensitivity", disable=not problem.progress)
        for tensor, packing in bar:
            start = layers.get(tensor.path, 0)
            with problem.packed({tensor.path: packing}):
                total = sum(d.divergence(problem.model, start) for d in data)
            journal.add(tensor.path, packing, total / sum(d.tokens.size for d in data))
    result: Sensitivity = {}
    for tensor in problem.tensors:
        errors = {p: error(problem.weights[tensor.path], p) for p in tensor.packings}
        probes = {p: journal.get(tensor.path, p) or 0.0 for p in anchors[tensor.path]}
        result[tensor.path] = _interpolate(errors, probes)
    return result


@dataclass(frozen=True)
class _Recorded:
    tokens: mx.array
    recording: Recording
    reference: Reference

    @classmethod
    def of(cls, model: nn.Module, tokens: mx.array) -> "_Recorded":
        logits, recording = record(model, tokens)
        return cls(tokens, recording, Reference.of(logits))

    def divergence(self, model: nn.Module, start: int) -> float:
        logits = resume(model, self.tokens, self.recording, start)
        return float(self.reference.divergence(logits).sum())


def _anchors(tensor: Tensor) -> tuple[Packing, ...]:
    """The two packings to probe: coarse enough to stand out of the noise."""
    packed = [p for p in tensor.packings if p.packed]

    def nearest(bits: int) -> Packing:
        return min(packed, key=lambda p: (abs(p.bits - bits), abs(p.group_size - 64)))

    return tuple(dict.fromkeys((nearest(2), nearest(3)))) if packed else ()


def _interpolate(
    errors: dict[Packing, float], probes: dict[Packing, float]
) -> dict[Packing, float]:
    """Cost of every candidate from the probes, rising strictly with the squared error."""
    points = sorted((errors[p], max(kl, 1e-12)) for p, kl in probes.items() if errors[p] > 0)
    if not points:
        return dict.fromkeys(errors, 0.0)
    (low_error, low_cost), (high_error, high_cost) = points[0], points[-1]
    power = 1.0
    if high_error > low_error:
        power = float(np.log(high_cost / low_cost) / np.log(high_error / low_error))
    power = min(max(power, 0.5), 3.0)

    def cost(squared: float) -> float:
        if squared <= low_error:
            return low_cost * squared / low_error
        return low_cost * (squared / low_error) ** power

    return {packing: cost(squared) for packing, squared in errors.items()}
