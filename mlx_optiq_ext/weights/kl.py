"""Sensitivity by direct measurement of the final logits' KL divergence."""

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from .blocks import Recording, layer_index, record, resume
from .divergence import Reference
from .packing import Packing, Tensor
from .sensitivity import Problem, Sensitivity, batches, error

#: Nats per token that count as no measured effect; keeps finer packings preferred even then.
LEAST = 1e-9


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


def anchor(tensor: Tensor) -> Packing:
    """The packing to measure: coarse enough to stand out of the noise, fine enough to be linear."""
    packed = [p for p in tensor.packings if p.packed]
    return min(packed, key=lambda p: (abs(p.bits - 3), abs(p.group_size - 64), p.bits))


def probe(problem: Problem, tensors: Iterable[Tensor]) -> dict[str, float]:
    """KL in nats per token with one tensor packed at a time, at the packing of `anchor`.

    The layers before the tensor are replayed. Measurements are kept in the problem's journal.
    """
    journal, wanted = problem.journal("kl"), list(tensors)
    missing = [t for t in wanted if journal.get(t.path, anchor(t)) is None]
    if missing:
        layers = layer_index(problem.model)
        data = [_Recorded.of(problem.model, b) for b in batches(problem.calibration.measured)]
        count = sum(d.tokens.size for d in data)
        for tensor in tqdm(missing, desc="Measuring", disable=not problem.progress):
            with problem.packed({tensor.path: anchor(tensor)}):
                start = layers.get(tensor.path, 0)
                total = sum(d.divergence(problem.model, start) for d in data)
            journal.add(tensor.path, anchor(tensor), total / count)
    return {t.path: max(journal.get(t.path, anchor(t)) or 0.0, LEAST) for t in wanted}


def scaled(problem: Problem, tensor: Tensor, measured: float) -> dict[Packing, float]:
    """Costs of all candidates from one measured one, in proportion to their squared error."""
    weight = problem.weights[tensor.path]
    scale = error(weight, anchor(tensor))
    # A tensor that quantizes without error (all zeros) costs nothing in any packing.
    return {p: measured * error(weight, p) / scale if scale > 0 else 0.0 for p in tensor.packings}


def kl(problem: Problem) -> Sensitivity:
    """Measure each tensor alone at one coarse packing.

    The cost of the other candidates follows in proportion to their squared error (HIGGS, arXiv
    2411.17525, shows that the divergence is linear in it at medium bits).
    """
    measured = probe(problem, problem.tensors)
    return {t.path: scaled(problem, t, measured[t.path]) for t in problem.tensors}
