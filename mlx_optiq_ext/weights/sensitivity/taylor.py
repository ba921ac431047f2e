"""Sensitivity from one backward pass: the second-order term of the KL divergence's expansion."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ... import distributed
from ...model.layers import decoder_layers
from ...planning.calibration import spread
from ...planning.journal import Journal
from ..candidates import Tensor
from ..precision import Precision, dequantized, pieces
from ..rounding import threads
from .backward import GradientError
from .curvature import Curvature
from .fisher import factors
from .kl import anchor, measured, probe
from .method import Need
from .moments import Factors, SpilledFactors, after_feedback
from .problem import Problem, Sensitivity, journal_key, layer_batches
from .remainder import ROWS, remainders

#: Tensors measured directly, to fit the scale of the expansion.
DIRECT = 4
#: Most sequences to differentiate if whole output moments are needed.
DIFFERENTIATED = 64
#: Bytes for all whole output moments, and the most outputs of a tensor to keep one for.
ACROSS, WIDEST = 2**30, 4096


@dataclass(frozen=True)
class Taylor:
    """Second-order Taylor expansion of the KL divergence, from one backward pass a sequence.

    The expansion predicts the KL of errors per row and input. One common scale is fitted to a few
    direct measurements. A tensor without a gradient is measured directly, as `KL` does.

    A conversion takes one forward and one backward pass of the model for each measured sequence;
    with refinement, for up to `DIFFERENTIATED` of the refinement sequences. Then every candidate
    is quantized once; with refinement, some rows of each tensor are also refined at two of them.
    Memory holds the model, the hidden states between its layers for all sequences, and one layer's
    activations and second moments.

    Attributes:
        rows: Rows of each tensor to refine, to find those of which far less is left than predicted;
            0 takes every prediction as it is.
    """

    name: str = "taylor"
    version: int = 8
    needs: frozenset[Need] = frozenset({Need.CALIBRATION, Need.GRADIENTS})
    rows: int = ROWS

    def measure(self, problem: Problem) -> Sensitivity:
        """Expand every candidate of every tensor of a problem."""
        return _expanded(problem, self.version, self.rows)


def _expanded(problem: Problem, version: int, rows: int) -> Sensitivity:
    ledger = _Ledger.of(problem, version, rows)
    missing = {t.path: t for t in problem.tensors if not ledger.has(t)}
    if missing:

        def visit(block: Mapping[str, Factors]) -> None:
            seen = {path: f for path, f in block.items() if path in missing and f.seen}
            ledger.write(problem, [missing.pop(path) for path in seen], seen)

        instead = "measuring each tensor directly, which takes longer"
        problem.findings.factors = differentiate(problem, instead, visit)
        for path, direct in measured(problem, missing.values()).items():
            ledger.direct.add_all((journal_key(path, p), kl) for p, kl in direct.items())
        ledger.direct.exchange()
    expanded = [t for t in problem.tensors if not ledger.was_measured(t)]
    anchors = {t.path: ledger.plain.get(journal_key(t.path, anchor(t))) for t in expanded}
    scale = fit(problem, expanded, anchors)
    result: Sensitivity = {}
    for tensor in problem.tensors:
        by, factor = (
            (ledger.direct, 1.0) if ledger.was_measured(tensor) else (ledger.predicted, scale)
        )
        found = {p: by.get(journal_key(tensor.path, p)) for p in tensor.precisions}
        result[tensor.path] = {p: factor * (kl or 0.0) for p, kl in found.items()}
    return result


@dataclass(frozen=True)
class _Ledger:
    """The measurements on disk.

    Attributes:
        predicted: KL by the expansion, not yet scaled.
        plain: KL by the expansion without error feedback, at the precision of `anchor`.
        direct: Measured KL of tensors without a gradient.
        rows: Rows of each tensor to refine.
    """

    predicted: Journal
    plain: Journal
    direct: Journal
    rows: int

    @classmethod
    def of(cls, problem: Problem, version: int, rows: int) -> "_Ledger":
        name = "taylor refined" if problem.refine else "taylor"
        if problem.refine and rows != ROWS:
            name = f"{name} from {rows} rows"
        names = (name, f"{name} anchors", "taylor direct")
        predicted, plain, direct = (problem.journal(each, version) for each in names)
        return cls(predicted, plain, direct, rows)

    def was_measured(self, tensor: Tensor) -> bool:
        return _knows(self.direct, tensor, tensor.precisions)

    def has(self, tensor: Tensor) -> bool:
        known = _knows(self.predicted, tensor, tensor.precisions)
        anchored = _knows(self.plain, tensor, [anchor(tensor)])
        return (known and anchored) or self.was_measured(tensor)

    def write(self, problem: Problem, tensors: list[Tensor], found: Mapping[str, Factors]) -> None:
        """Predict the KL of some tensors' candidates; each process takes some of these."""
        every = [(tensor, precision) for tensor in tensors for precision in tensor.precisions]
        mine = distributed.share(every)
        # The moments after feedback are expensive, so they are computed once.
        if problem.refine:
            mine = distributed.span(every, [math.prod(tensor.shape) for tensor, _ in every])
        own: dict[str, list[Precision]] = {}
        for tensor, precision in mine:
            own.setdefault(tensor.path, []).append(precision)
        rows = self.rows if problem.refine else 0
        left = remainders(problem.weights, tensors, found, rows)
        reduced = None
        if problem.refine:
            with threads.single():
                reduced = after_feedback(found[path] for path in own)
        for tensor in tensors:
            precisions, at = own.get(tensor.path, []), anchor(tensor)
            if not precisions:
                continue
            factors = found[tensor.path]
            curvature = factors.curvature(feedback=problem.refine, reduced=reduced)
            these = predictions(problem, tensor, curvature, precisions)
            by = left[tensor.path].correction
            self.predicted.add_all(
                (journal_key(tensor.path, p), c * by(p.bits)) for p, c in these.items()
            )
            if at in precisions:
                if problem.refine:
                    these = predictions(problem, tensor, factors.curvature(), [at])
                self.plain.add(journal_key(tensor.path, at), these[at])
        self.predicted.exchange()
        self.plain.exchange()


def _knows(journal: Journal, tensor: Tensor, precisions: Iterable[Precision]) -> bool:
    return all(journal.get(journal_key(tensor.path, p)) is not None for p in precisions)


def differentiated(problem: Problem) -> Mapping[str, Factors]:
    """Every tensor's factors for rounding; empty ones if MLX cannot differentiate the model.

    With refinement, more sequences are used, and whole output moments are kept as far as `widest`
    allows. Computed once for each problem.
    """
    if problem.findings.factors is None:
        problem.findings.factors = differentiate(problem, "refining against its inputs only")
    return problem.findings.factors


def differentiate(
    problem: Problem,
    instead: str,
    visit: Callable[[Mapping[str, Factors]], None] = lambda found: None,
) -> Mapping[str, Factors]:
    """Pass each block's factors to ``visit``, and return those that rounding needs.

    Args:
        problem: The model to differentiate.
        instead: The fallback if MLX cannot differentiate it, for the note. All factors are then
            empty.
        visit: Called with the factors of one block after another, by tensor path.
    """
    tokens, across = problem.calibration.measured, set()
    if problem.refine:
        tokens = problem.calibration.refining
        tokens = tokens[spread(len(tokens), DIFFERENTIATED)]
        across = widest(problem.tensors)
    spill = problem.spill(tokens.size)
    kept: dict[str, Factors] | SpilledFactors = {} if spill is None else SpilledFactors(spill)
    blocks = _tried(
        problem,
        factors(
            problem.model,
            layer_batches(tokens),
            across=across,
            stream=problem.stream,
            parts=problem.parts,
            spill=spill,
        ),
        instead,
    )
    total = len(decoder_layers(problem.model)) + 1
    for found in tqdm(blocks, desc="Measuring", total=total, disable=not problem.progress):
        visit(found)
        kept.update({path: factor.kept for path, factor in found.items()})
        found.clear()  # only one block's moments are in memory
    return kept


def _tried(
    problem: Problem, blocks: Iterator[dict[str, Factors]], instead: str
) -> Iterator[dict[str, Factors]]:
    try:
        yield from blocks
    except GradientError as error:
        problem.note(f"This model cannot be differentiated ({error}): {instead}")
        yield {tensor.path: Factors() for tensor in problem.tensors}


def widest(tensors: Iterable[Tensor]) -> set[str]:
    """Paths whose output moments fit into `ACROSS` together, the narrowest first.

    A head as wide as the vocabulary is left out.
    """
    chosen, total = set(), 0
    for tensor in sorted(tensors, key=lambda t: t.shape[-2]):
        total += 4 * tensor.shape[-2] ** 2
        if total > ACROSS or tensor.shape[-2] > WIDEST:
            break
        chosen.add(tensor.path)
    return chosen


def predictions(
    problem: Problem, tensor: Tensor, curvature: Curvature, precisions: Iterable[Precision]
) -> dict[Precision, float]:
    """KL in nats per token of some candidates of one tensor; not yet scaled.

    Args:
        problem: Whose weights.
        tensor: The tensor.
        curvature: Its curvature, with error feedback or without.
        precisions: Candidates.
    """
    expected = dict.fromkeys(precisions, 0.0)
    begun: list[tuple[Precision, mx.array]] = []

    def settle(most: int) -> None:
        while len(begun) > most:
            p, kl = begun.pop(0)
            expected[p] += float(kl)

    for at, weight in pieces(problem.weights[tensor.path]):
        exact, own = weight.astype(mx.float32), curvature.part(at)
        for p in expected:
            if p.quantized:
                kl = own.expected(dequantized(weight, p, mx.float32) - exact)
                mx.async_eval(kl)
                begun.append((p, kl))
                settle(1)  # one ahead of the device, and no more
    settle(0)
    return expected


def fit(problem: Problem, tensors: list[Tensor], predicted: Mapping[str, float | None]) -> float:
    """The factor that brings the expansion to a few directly measured divergences.

    Args:
        problem: The problem to measure.
        tensors: Tensors with a prediction.
        predicted: KL of each at the precision of `anchor`, not yet scaled.
    """
    known = {path: kl for path, kl in predicted.items() if kl is not None and kl > 0}
    ordered = sorted((t for t in tensors if t.path in known), key=lambda t: known[t.path])
    if not ordered:
        return 1.0
    # Spread over the upper half, because small effects are lost in noise.
    positions = np.linspace(len(ordered) // 2, len(ordered) - 1, DIRECT).round().astype(int)
    probes = probe(problem, [ordered[i] for i in np.unique(positions)])
    ratios = [np.log(kl / known[path]) for path, kl in probes.items()]
    return float(np.exp(np.mean(ratios)))
