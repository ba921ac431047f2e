"""Sensitivity by direct measurement of the final logits' KL divergence."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ... import distributed
from ...model.layers import decoder_layers, layer_index
from ...model.layerwise import recordings
from ...model.replay import Recording, replayed
from ...planning.divergence import Reference
from ...planning.journal import Journal
from ...planning.parts import Parts
from ..candidates import Tensor
from ..precision import Precision
from .method import Need
from .problem import BATCH, Problem, Sensitivity, error, journal_key

T = TypeVar("T")

#: Tensors that each process measures between two exchanges of results.
ROUND = 8
#: Nats per token below which there is no measured effect; finer precisions are still preferred.
LEAST = 1e-9
#: Nats per token below which rounding noise of the forward pass matters.
NOISE = 1e-6
#: Bits at which tensors are measured first.
FIRST = (2, 3, 4)
#: One in this many layers has its tensors measured at several precisions.
APART = 12
#: Largest difference, as a natural logarithm, between two neighbours' ratios of divergence to
#: squared error; beyond it a precision between them is measured too.
TOLERANCE = 0.2
#: Most bytes of logits that are computed at once; larger batches use a GPU better.
LOGITS = 2**28


@dataclass(frozen=True)
class _Recorded:
    tokens: mx.array
    recording: Recording
    reference: Reference

    @classmethod
    def of(cls, problem: Problem, tokens: mx.array) -> "_Recorded":
        (recording,) = recordings(problem.model, [tokens], problem.stream)
        replay = replayed(recording, len(decoder_layers(problem.model)))
        return cls(tokens, recording, Reference.run(problem.parts, tokens, replay))

    def divergence(self, parts: Parts, start: int) -> float:
        replay = replayed(self.recording, start)
        return float(self.reference.compared(parts, self.tokens, replay).sum())


class Probes:
    """Measures single tensors, with the layers before them replayed; known results are reused.

    A change in a layer's experts does not change the routing in that layer. Later layers route
    again, as in the quantized model.
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        self.journal: Journal = problem.journal(KL.name, KL.version)

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

    def __call__(self, tensor: Tensor, precision: Precision) -> float:
        """KL in nats per token with one tensor quantized, at least `LEAST`."""
        key = journal_key(tensor.path, precision)
        known = self.journal.get(key)
        if known is None:
            data, start = self._data, self._layers.get(tensor.path, 0)
            with self.problem.quantized({tensor.path: precision}):
                total = sum(d.divergence(self.problem.parts, start) for d in data)
            known = total / sum(d.tokens.size for d in data)
            self.journal.add(key, known)
        return max(known, LEAST)


def anchor(tensor: Tensor, bits: int = 3) -> Precision:
    """The precision to measure first: 3 bits are above the noise and nearly linear."""
    return _nearest((p for p in tensor.precisions if p.quantized), bits)


def _nearest(precisions: Iterable[Precision], bits: int = 3) -> Precision:
    return min(precisions, key=lambda p: (abs(p.bits - bits), abs(p.group_size - 64), p.bits))


def probe(problem: Problem, tensors: Iterable[Tensor]) -> dict[str, float]:
    """KL in nats per token with one tensor quantized at a time, at the precision of `anchor`.

    Measurements are kept in the problem's journal.
    """
    measure = Probes(problem)
    return _shared(problem, measure, tensors, lambda tensor: measure(tensor, anchor(tensor)))


def _shared(
    problem: Problem,
    measure: Probes,
    tensors: Iterable[Tensor],
    work: Callable[[Tensor], T],
) -> dict[str, T]:
    """Measure all tensors; each process of ``mlx.launch`` measures some of them."""
    every, found = list(tensors), dict[str, T]()
    rounds = [
        every[i : i + ROUND * distributed.size()]
        for i in range(0, len(every), ROUND * distributed.size())
    ]
    bar = tqdm(total=len(every), desc="Measuring", disable=not (problem.progress and every))
    with bar:
        for tensors in rounds:
            own = {}
            for tensor in distributed.share(tensors):
                own[tensor.path] = work(tensor)
                bar.update(distributed.size())
            measure.journal.exchange()
            for part in distributed.gathered(own):
                found.update(part)
    return {tensor.path: found[tensor.path] for tensor in every}


@dataclass(frozen=True)
class KL:
    """KL divergence of the logits, with one tensor quantized at a time.

    It needs no gradients, so it works for any model. Most tensors take one forward pass of the
    layers from their own on, over all measured sequences; one tensor in `APART` layers of each kind
    takes three or more. Memory holds the model, the hidden states between its layers for all
    measured sequences, and the reference's leading log-probabilities.
    """

    name: str = "kl"
    version: int = 6
    needs: frozenset[Need] = frozenset({Need.CALIBRATION})

    def measure(self, problem: Problem) -> Sensitivity:
        """Measure every tensor of a problem with `measured`."""
        return measured(problem, problem.tensors)


def measured(
    problem: Problem, tensors: Iterable[Tensor], probes: Probes | None = None
) -> Sensitivity:
    """Measure each tensor alone, a few of them at several precisions.

    The divergence grows with a precision's squared error, and in proportion to it at medium bits
    (HIGGS, arXiv 2411.17525). The deviation from that is measured on the tensors of one in
    `APART` layers, at as many precisions as it takes for neighbours to agree. Other tensors of the
    same kind take the curve of the nearest one, scaled by a single measurement.

    Args:
        problem: The model to measure.
        tensors: The tensors to measure.
        probes: Measures a tensor at a precision; None measures the divergence.
    """
    every, measure = list(tensors), probes or Probes(problem)
    guides = guided(every, layer_index(problem.model))

    def errors_of(tensor: Tensor) -> dict[Precision, float]:
        weight = problem.weights[tensor.path]
        return {p: error(weight, p) for p in tensor.precisions}

    def lead(tensor: Tensor) -> _Curve:
        errors = errors_of(tensor)
        return _Curve(errors, _known(tensor, errors, measure))

    def follow(tensor: Tensor) -> _Curve:
        errors, at = errors_of(tensor), anchor(tensor)
        if errors[at] == 0:
            return _Curve(errors, {})
        each = measure(tensor, at) / errors[at]
        shape = {**curves[guides[tensor.path]].strays(), at: 1.0}
        return _Curve(errors, {p: each * errors[p] * f for p, f in shape.items() if errors.get(p)})

    leading = [tensor for tensor in every if guides[tensor.path] == tensor.path]
    curves = _shared(problem, measure, leading, lead)
    rest = [tensor for tensor in every if tensor.path not in curves]
    curves |= _shared(problem, measure, rest, follow)
    return {t.path: interpolated(curves[t.path].errors, curves[t.path].known) for t in every}


@dataclass(frozen=True)
class _Curve:
    """Squared errors of a tensor's precisions, and the measured divergences in nats."""

    errors: dict[Precision, float]
    known: dict[Precision, float]

    def strays(self) -> dict[Precision, float]:
        """Ratio of each measured divergence to that at 3 bits, by squared error."""
        if not self.known:
            return {}
        at = _nearest(self.known)
        each = self.known[at] / self.errors[at]
        return {p: found / self.errors[p] / each for p, found in self.known.items()}


def guided(tensors: Iterable[Tensor], layers: Mapping[str, int]) -> dict[str, str]:
    """Tensor path -> path of the tensor whose curve it uses; itself if it has its own.

    Args:
        tensors: The tensors to measure.
        layers: Path -> decoder layer, for tensors in one.
    """
    kinds: dict[str, dict[int, str]] = {}
    found = {tensor.path: tensor.path for tensor in tensors}
    for path in found:
        if path in layers:
            kind = re.sub(r"\.\d+\.", ".", path, count=1)  # individual experts are separate kinds
            kinds.setdefault(kind, {})[layers[path]] = path
    for members in kinds.values():
        parts = np.array_split(sorted(members), -(-len(members) // APART))
        leading = [int(part[len(part) // 2]) for part in parts]
        for layer, path in members.items():
            found[path] = members[min(leading, key=lambda other: abs(other - layer))]
    return found


def _known(
    tensor: Tensor, errors: Mapping[Precision, float], measure: Probes
) -> dict[Precision, float]:
    known: dict[Precision, float] = {}
    wanted: Precision | None = anchor(tensor, FIRST[0])
    while wanted is not None:
        if errors[wanted] > 0:
            known[wanted] = measure(tensor, wanted)
        ends = (anchor(tensor, bits) for bits in FIRST)
        unknown = (p for p in ends if errors[p] > 0 and p not in known)
        wanted = next(unknown, None) or doubtful(errors, known)
    return known


def doubtful(
    errors: Mapping[Precision, float], known: Mapping[Precision, float]
) -> Precision | None:
    """The precision to measure next, or None if neighbouring measurements agree.

    Args:
        errors: Precision -> its squared error.
        known: Precision -> measured divergence, positive; precisions with an error only.
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
    errors: Mapping[Precision, float], known: Mapping[Precision, float]
) -> dict[Precision, float]:
    """Expected KL at all precisions: interpolated on log scales, proportional beyond.

    It never falls with a larger error, even if the measurements are noisy.
    """
    order = sorted(known, key=lambda p: errors[p])
    if not order:
        return dict.fromkeys(errors, 0.0)
    x = np.log([errors[p] for p in order])
    y = np.maximum.accumulate(np.log([known[p] for p in order]))
    found: dict[Precision, float] = {}
    for precision, size in errors.items():
        if size > 0:
            at = np.log(size)
            beyond = min(at - x[0], 0.0) + max(at - x[-1], 0.0)
            found[precision] = float(np.exp(np.interp(at, x, y) + beyond))
        else:
            found[precision] = 0.0
    return found
