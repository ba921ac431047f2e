"""Sensitivity from one backward pass: the second-order term of the KL divergence's expansion."""

from collections.abc import Iterable

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from .fisher import factors
from .kl import anchor, measured, probe
from .moments import Factors
from .packing import Packing, Tensor, dequantized
from .sensitivity import Problem, Sensitivity, batches

#: Tensors measured directly, to fit the scale of the expansion.
DIRECT = 4
#: Windows and draws of labels for whole output moments, which fewer leave noisy.
WINDOWS, DRAWS = 48, 3
#: Bytes for whole output moments together, and outputs beyond which a tensor's is never kept.
ACROSS, WIDEST = 2**30, 4096


def taylor(problem: Problem) -> Sensitivity:
    """Cost every candidate of every tensor with its Fisher factors.

    The expansion knows which tensors matter and which errors do, per row and input; one scale for
    all of them is fitted to a few direct measurements. A tensor that no gradient reached is
    measured directly.
    """
    journal = problem.journal("taylor refined" if problem.refine else "taylor")
    missing = [
        t for t in problem.tensors if any(journal.get(t.path, p) is None for p in t.packings)
    ]
    if missing:
        found = differentiated(problem)
        seen = [t for t in missing if found[t.path].seen]
        scale = fit(problem, seen, found)
        for tensor in tqdm(seen, desc="Costing", disable=not problem.progress):
            journal.add_all(
                tensor.path,
                {p: scale * c for p, c in costs(problem, tensor, found[tensor.path]).items()},
            )
        unseen = [t for t in missing if not found[t.path].seen]
        for path, direct in measured(problem, unseen).items():
            journal.add_all(path, direct)
    return {t.path: {p: journal.get(t.path, p) or 0.0 for p in t.packings} for t in problem.tensors}


def differentiated(problem: Problem) -> dict[str, Factors]:
    """The factors of every tensor; empty ones if MLX cannot differentiate the model.

    For a problem that will be refined, more windows and draws of labels are used, and output
    moments are kept whole as far as `widest` allows. Computed once a problem.
    """
    if "factors" not in problem.results:
        problem.results["factors"] = _differentiated(problem)
    return problem.results["factors"]


def _differentiated(problem: Problem) -> dict[str, Factors]:
    tokens, draws, across = problem.calibration.measured, 1, set()
    if problem.refine:
        every = max(1, len(problem.calibration.refining) // WINDOWS)
        tokens, draws = problem.calibration.refining[::every], DRAWS
        across = widest(problem.tensors)
    data = batches(tokens)
    try:
        with tqdm(total=len(data), desc="Backward passes", disable=not problem.progress) as bar:
            return factors(problem.model, data, bar.update, draws=draws, across=across)
    except (ValueError, RuntimeError) as error:  # an operation or kernel without a gradient
        reason = str(error).strip().partition("\n")[0]
        problem.say(
            f"[optiq] This model cannot be differentiated ({reason}): measuring each tensor "
            "directly, which takes longer"
        )
        return {tensor.path: Factors() for tensor in problem.tensors}


def widest(tensors: Iterable[Tensor]) -> set[str]:
    """Paths whose output moments fit `ACROSS` together, the narrowest first.

    A head as wide as the vocabulary is left out.
    """
    chosen, total = set(), 0
    for tensor in sorted(tensors, key=lambda t: t.shape[-2]):
        total += 4 * tensor.shape[-2] ** 2
        if total > ACROSS or tensor.shape[-2] > WIDEST:
            break
        chosen.add(tensor.path)
    return chosen


def costs(problem: Problem, tensor: Tensor, found: Factors) -> dict[Packing, float]:
    """KL in nats per token of each candidate of one tensor, not yet scaled."""
    weight = problem.weights[tensor.path]
    exact = weight.astype(mx.float32)
    left = found.residuals() if problem.refine else None
    return {
        p: found.cost(dequantized(weight, p, mx.float32) - exact, left) if p.packed else 0.0
        for p in tensor.packings
    }


def fit(problem: Problem, tensors: list[Tensor], found: dict[str, Factors]) -> float:
    """The factor that brings the expansion to a few directly measured divergences."""
    predicted = {}
    for tensor in tensors:
        weight = problem.weights[tensor.path]
        left = dequantized(weight, anchor(tensor), mx.float32) - weight.astype(mx.float32)
        predicted[tensor.path] = found[tensor.path].cost(left)
    ordered = sorted((t for t in tensors if predicted[t.path] > 0), key=lambda t: predicted[t.path])
    if not ordered:
        return 1.0
    # Spread over the upper half: what matters little stands out of the noise least.
    positions = np.linspace(len(ordered) // 2, len(ordered) - 1, DIRECT).round().astype(int)
    probes = probe(problem, [ordered[i] for i in np.unique(positions)])
    ratios = [np.log(kl / predicted[path]) for path, kl in probes.items()]
    return float(np.exp(np.mean(ratios)))
