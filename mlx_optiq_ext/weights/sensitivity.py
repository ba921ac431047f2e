"""How much each tensor costs in each packing, measured on the model itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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

#: Nats per token that count as no measured effect; keeps finer packings preferred even then.
LEAST = 1e-9


@dataclass(frozen=True)
class Problem:
    """A model whose tensors are to be measured.

    Attributes:
        model: The model, with every parameter in the dtype to compute in.
        weights: Tensor path -> weight ``(..., out, in)`` in the dtype it is stored in.
        tensors: The tensors to measure, with their candidates.
        calibration: Token windows.
        key: What identifies the model and the device, under which measurements are kept on disk;
            None keeps none.
        progress: Whether to show a progress bar.
    """

    model: nn.Module
    weights: dict[str, mx.array]
    tensors: tuple[Tensor, ...]
    calibration: Calibration
    key: dict[str, Any] | None = None
    progress: bool = True

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype that products are computed in."""
        modules = dict(quantizable(self.model))
        return modules[self.tensors[0].path].weight.dtype

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

    Each tensor is probed at one coarse packing, with the layers before it replayed; the cost of the
    other candidates follows in proportion to their squared error (HIGGS, arXiv 2411.17525, shows
    that the divergence is linear in it at medium bits).
    """
    key = problem.key and {
        **problem.key,
        "method": "kl",
        "tokens": problem.calibration.digest,
        "version": 1,
    }
    journal = Journal(key)
    probes = {t.path: _probe(t) for t in problem.tensors}
    missing = [t for t in problem.tensors if journal.get(t.path, probes[t.path]) is None]
    if missing:
        layers = layer_index(problem.model)
        data = [_Recorded.of(problem.model, b) for b in batches(problem.calibration.measured)]
        count = sum(d.tokens.size for d in data)
        for tensor in tqdm(missing, desc="Measuring", disable=not problem.progress):
            probe = probes[tensor.path]
            with problem.packed({tensor.path: probe}):
                start = layers.get(tensor.path, 0)
                total = sum(d.divergence(problem.model, start) for d in data)
            journal.add(tensor.path, probe, total / count)
    result: Sensitivity = {}
    for tensor in problem.tensors:
        weight, probe = problem.weights[tensor.path], probes[tensor.path]
        measured, scale = journal.get(tensor.path, probe) or 0.0, error(weight, probe)
        # A tensor that quantizes without error (all zeros) costs nothing in any packing.
        result[tensor.path] = {
            p: max(measured, LEAST) * error(weight, p) / scale if scale > 0 else 0.0
            for p in tensor.packings
        }
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


def _probe(tensor: Tensor) -> Packing:
    """The packing to measure: coarse enough to stand out of the noise, fine enough to be linear."""
    packed = [p for p in tensor.packings if p.packed]
    return min(packed, key=lambda p: (abs(p.bits - 3), abs(p.group_size - 64), p.bits))
