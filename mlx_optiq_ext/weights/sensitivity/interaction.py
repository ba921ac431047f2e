"""Sensitivities around a low-bit plan, rather than around the unquantized model.

At low bits the effects of quantized tensors do not add up (IMPQ, arXiv 2509.15455). The Fisher
information of the quantized model shows how sensitive it is to each tensor beside the others.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from ... import distributed
from ...model.layers import quantizable
from ..precision import Precision, dequantized, pieces
from .backward import GradientError
from .fisher import factors
from .problem import Problem, Sensitivity, batches

#: Weights of the quantized model's Fisher information, from 0 to 1; each gives one plan.
SHARES = (0.5, 1.0)


def around(
    problem: Problem, sensitivity: Sensitivity, precisions: Mapping[str, Precision]
) -> list[Sensitivity]:
    """Sensitivities re-measured around a plan, one for each of `SHARES`.

    Each tensor's sensitivities are scaled by the KL that the quantized model's Fisher information
    predicts at the planned precision, over the one expected so far, to the power of the share.

    Args:
        problem: The planned problem; its model is not changed.
        sensitivity: The sensitivities that the plan was made from.
        precisions: The plan.

    Returns:
        An empty list if MLX cannot differentiate the model, or if its layers are on disk.
    """
    if problem.stream is not None:
        problem.note("A model that is read layer by layer gets no second round of plans")
        return []
    try:
        ratios = _ratios(problem, sensitivity, precisions)
    except GradientError as error:
        problem.note(f"This model cannot be differentiated ({error}): no second round of plans")
        return []
    if not ratios:
        return []
    middle = float(np.median(list(ratios.values())))
    factor = {path: ratios.get(path, middle) / middle for path in sensitivity}
    return [_scaled(sensitivity, {k: f**share for k, f in factor.items()}) for share in SHARES]


def _scaled(sensitivity: Sensitivity, factor: Mapping[str, float]) -> Sensitivity:
    return {k: {p: kl * factor[k] for p, kl in row.items()} for k, row in sensitivity.items()}


def _ratios(
    problem: Problem, sensitivity: Sensitivity, precisions: Mapping[str, Precision]
) -> dict[str, float]:
    ratios: dict[str, float] = {}
    with _packed(problem, precisions):
        tokens = batches(problem.calibration.measured)
        for block in factors(problem.model, tokens, parts=problem.parts):
            own = {}
            for path in distributed.share(list(block)):
                precision = precisions.get(path)
                before = sensitivity[path].get(precision, 0.0) if precision is not None else 0.0
                if precision is not None and precision.quantized and before > 0:
                    curvature, after = block[path].curvature(), 0.0
                    for at, weight in pieces(problem.weights[path]):
                        left = dequantized(weight, precision, mx.float32)
                        after += curvature.part(at).kl(left - weight.astype(mx.float32))
                    if after > 0:
                        own[path] = after / before
            found = {
                path: ratio for part in distributed.gathered(own) for path, ratio in part.items()
            }
            ratios |= {path: found[path] for path in block if path in found}
    return ratios


@contextmanager
def _packed(problem: Problem, precisions: Mapping[str, Precision]) -> Iterator[None]:
    """The quantized model, without a copy of the unquantized weights beside it."""
    modules, dtype = dict(quantizable(problem.model)), problem.dtype
    try:
        for path, precision in precisions.items():
            modules[path].weight = dequantized(problem.weights[path], precision, dtype)
        yield
    finally:
        for path in precisions:
            modules[path].weight = problem.weights[path].astype(dtype)
