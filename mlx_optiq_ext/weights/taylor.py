"""Sensitivity from one backward pass: the second-order term of the KL divergence's expansion."""

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from .fisher import Factors, factors, residual
from .kl import anchor, probe, scaled
from .packing import Packing, Tensor, dequantized
from .sensitivity import Problem, Sensitivity, batches

#: Tensors measured directly, to fit the scale of the expansion.
DIRECT = 4


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
        data = batches(problem.calibration.measured)
        with tqdm(total=len(data), desc="Backward passes", disable=not problem.progress) as bar:
            found = factors(problem.model, data, bar.update)
        seen = [t for t in missing if found[t.path].seen]
        scale = fit(problem, seen, found)
        for tensor in tqdm(seen, desc="Costing", disable=not problem.progress):
            journal.add_all(
                tensor.path,
                {p: scale * c for p, c in costs(problem, tensor, found[tensor.path]).items()},
            )
        unseen = {t.path: t for t in missing if not found[t.path].seen}
        for path, measured in probe(problem, unseen.values()).items():
            journal.add_all(path, scaled(problem, unseen[path], measured))
    return {t.path: {p: journal.get(t.path, p) or 0.0 for p in t.packings} for t in problem.tensors}


def costs(problem: Problem, tensor: Tensor, found: Factors) -> dict[Packing, float]:
    """KL in nats per token of each candidate of one tensor, not yet scaled."""
    weight = problem.weights[tensor.path]
    exact, left = weight.astype(mx.float32), None
    if problem.refine and found.uses is None and found.inputs is not None:
        left = residual(found.inputs)
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
    measured = probe(problem, [ordered[i] for i in np.unique(positions)])
    ratios = [np.log(kl / predicted[path]) for path, kl in measured.items()]
    return float(np.exp(np.mean(ratios)))
