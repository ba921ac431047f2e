"""Sensitivity by direct measurement of the final logits' KL divergence."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from .. import ranks
from .blocks import Recording, decoder_layers, layer_index, record, resume
from .divergence import Reference
from .journal import Journal
from .lockstep import recordings
from .packing import Packing, Tensor
from .sensitivity import BATCH, Problem, Sensitivity, error

T = TypeVar("T")

#: Tensors that each rank measures before it hands over what it found.
ROUND = 8
#: Nats per token that count as no measured effect; keeps finer packings preferred even then.
LEAST = 1e-9
#: Nats per token below which rounding in the forward pass shows.
NOISE = 1e-6
#: Bits of the packings that are measured first.
FIRST = (2, 4)
#: Natural logarithm by which two measurements may stray from proportion to their squared errors
#: before one between them is measured too.
TOLERANCE = 0.2
#: Bytes of logits that may be computed at once; a larger batch keeps a GPU busier.
LOGITS = 2**28


@dataclass(frozen=True)
class _Recorded:
    tokens: mx.array
    recording: Recording
    reference: Reference

    @classmethod
    def of(cls, problem: Problem, tokens: mx.array) -> "_Recorded":
        model = problem.model
        if problem.stream is None:
            logits, recording = record(model, tokens)
        else:
            (recording,) = recordings(model, [tokens], problem.stream)
            logits = resume(model, tokens, recording, len(decoder_layers(model)))
        return cls(tokens, recording, Reference.of(logits))

    def divergence(self, model: nn.Module, start: int) -> float:
        logits = resume(model, self.tokens, self.recording, start)
        return float(self.reference.divergence(logits).sum())


class _Probes:
    """Measures single tensors, with the layers before them replayed; what is known is not measured.

    A change in a layer's experts leaves the routing in that layer as the reference took it; later
    layers route anew, as they will in the packed model.
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        self.journal: Journal = problem.journal("kl")

    @cached_property
    def _data(self) -> list[_Recorded]:
        model, tokens = self.problem.model, self.problem.calibration.measured
        vocabulary = model(mx.array(tokens[:1, :1])).shape[-1]  # not evaluated
        rows = max(BATCH, LOGITS // (4 * tokens.shape[1] * vocabulary))
        starts = range(0, len(tokens), rows)
        return [_Recorded.of(self.problem, mx.array(tokens[i : i + rows])) for i in starts]

    @cached_property
    def _layers(self) -> dict[str, int]:
        return layer_index(self.problem.model)

    def __call__(self, tensor: Tensor, packing: Packing) -> float:
        """KL in nats per token with one tensor packed, at least `LEAST`."""
        known = self.journal.get(tensor.path, packing)
        if known is None:
            data, start = self._data, self._layers.get(tensor.path, 0)
            with self.problem.packed({tensor.path: packing}):
                total = sum(d.divergence(self.problem.model, start) for d in data)
            known = total / sum(d.tokens.size for d in data)
            self.journal.add(tensor.path, packing, known)
        return max(known, LEAST)


def anchor(tensor: Tensor, bits: int = 3) -> Packing:
    """A packing to measure: 3 bits stand out of the noise and are near to linear."""
    packed = [p for p in tensor.packings if p.packed]
    return min(packed, key=lambda p: (abs(p.bits - bits), abs(p.group_size - 64), p.bits))


def probe(problem: Problem, tensors: Iterable[Tensor]) -> dict[str, float]:
    """KL in nats per token with one tensor packed at a time, at the packing of `anchor`.

    Measurements are kept in the problem's journal.
    """
    measure = _Probes(problem)
    return _shared(problem, measure, tensors, lambda tensor: measure(tensor, anchor(tensor)))


def _shared(
    problem: Problem,
    measure: _Probes,
    tensors: Iterable[Tensor],
    work: Callable[[Tensor], T],
) -> dict[str, T]:
    """What is measured of each tensor; the ranks of ``mlx.launch`` take some each."""
    every, found = list(tensors), dict[str, T]()
    rounds = [
        every[i : i + ROUND * ranks.size()] for i in range(0, len(every), ROUND * ranks.size())
    ]
    bar = tqdm(total=len(every), desc="Measuring", disable=not problem.progress)
    with bar:
        for tensors in rounds:
            own = {}
            for tensor in ranks.share(tensors):
                own[tensor.path] = work(tensor)
                bar.update(ranks.size())
            measure.journal.exchange()
            for part in ranks.gathered(own):
                found.update(part)
    return {tensor.path: found[tensor.path] for tensor in every}


def kl(problem: Problem) -> Sensitivity:
    """Measure every tensor with `measured`."""
    return measured(problem, problem.tensors)


def measured(problem: Problem, tensors: Iterable[Tensor]) -> Sensitivity:
    """Measure each tensor alone at a few packings.

    The divergence grows with a packing's squared error, and in proportion to it at medium bits
    (HIGGS, arXiv 2411.17525). So only as many candidates are measured as it takes for neighbours to
    agree on that proportion; the others are interpolated.
    """
    measure = _Probes(problem)
    return _shared(problem, measure, tensors, lambda tensor: _costs(problem, tensor, measure))


def _costs(problem: Problem, tensor: Tensor, measure: _Probes) -> dict[Packing, float]:
    weight = problem.weights[tensor.path]
    errors = {p: error(weight, p) for p in tensor.packings}
    known: dict[Packing, float] = {}
    wanted: Packing | None = anchor(tensor, FIRST[0])
    while wanted is not None:
        if errors[wanted] > 0:
            known[wanted] = measure(tensor, wanted)
        ends = (anchor(tensor, bits) for bits in FIRST)
        unknown = (p for p in ends if errors[p] > 0 and p not in known)
        wanted = next(unknown, None) or doubtful(errors, known)
    return interpolated(errors, known)


def doubtful(errors: Mapping[Packing, float], known: Mapping[Packing, float]) -> Packing | None:
    """The packing to measure next, or None when neighbours among the known agree.

    Args:
        errors: Packing -> its squared error.
        known: Packing -> measured divergence, positive; packings with an error only.
    """
    order = sorted(known, key=lambda p: errors[p])
    for less, more in pairwise(order):
        between = [p for p in errors if errors[less] < errors[p] < errors[more]]
        stray = np.log(known[more] / known[less]) - np.log(errors[more] / errors[less])
        if between and abs(stray) > TOLERANCE and known[more] > NOISE:
            middle = np.sqrt(errors[less] * errors[more])
            return min(between, key=lambda p: abs(np.log(errors[p] / middle)))
    return None


def interpolated(
    errors: Mapping[Packing, float], known: Mapping[Packing, float]
) -> dict[Packing, float]:
    """Costs of all packings: between measured ones on log scales, in proportion beyond them.

    They never fall with a larger error, however noisy the measurements.
    """
    order = sorted(known, key=lambda p: errors[p])
    if not order:
        return dict.fromkeys(errors, 0.0)
    x = np.log([errors[p] for p in order])
    y = np.maximum.accumulate(np.log([known[p] for p in order]))
    costs: dict[Packing, float] = {}
    for packing, size in errors.items():
        if size > 0:
            at = np.log(size)
            beyond = min(at - x[0], 0.0) + max(at - x[-1], 0.0)
            costs[packing] = float(np.exp(np.interp(at, x, y) + beyond))
        else:
            costs[packing] = 0.0
    return costs
