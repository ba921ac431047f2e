"""Plans for several budgets and uniform quantizations beside them, each judged."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ... import distributed
from ...errors import InputError
from ...planning.budget import Budget
from ..candidates import Size
from ..judgement import Precisions
from ..pipeline import Source, opened
from ..plan import Plan
from ..plan_search import Study, search, stored, uniformly
from ..precision import BITS, Precision
from ..request import Request
from ..study import check_budget, study_model
from .comparison import compare
from .expense import Expense, expense


@dataclass(frozen=True)
class Point:
    """A plan, or a uniform quantization.

    Attributes:
        name: The budget as it was asked for, or the uniform precision.
        bpw: Bits per weight.
        file_bytes: All weight files with their headers, at most.
        kl: KL on the held-out sequences as MLX rounds, in nats per token.
        expected: Expected KL of the converted model: `kl`, or what the sensitivities predict to
            be left after a refinement.
        perplexity_ratio: Perplexity as MLX rounds over that of the unquantized model.
        plan: The plan, if it is one.
    """

    name: str
    bpw: float
    file_bytes: int
    kl: float
    expected: float
    perplexity_ratio: float
    plan: Plan | None = None


@dataclass(frozen=True)
class Curve:
    """What conversions would come to.

    Attributes:
        name: The model's name, as the user gave it.
        plans: One for each budget, by rising size.
        uniforms: Uniform quantizations of every width, by rising size; tensors that pins leave
            alone stay alone in them.
        original: Bytes of the 16-bit files.
        text: Name of the calibration text.
        tokens: Held-out tokens that all were judged on.
        effort: How far the conversions would go.
        expense: Of the last plan's conversion.
    """

    name: str
    plans: tuple[Point, ...]
    uniforms: tuple[Point, ...]
    original: int
    text: str
    tokens: int
    effort: str
    expense: Expense


def forecast(
    path_or_repo: str, request: Request, budgets: Sequence[Budget | float], **source: Any
) -> Curve:
    """Plan one conversion or several and judge them, without converting.

    Measurements are kept as a conversion keeps them. The processes of ``mlx.launch`` measure and
    judge together.

    Args:
        path_or_repo: A folder or a Hub repository.
        request: The settings; its own budget does not count.
        budgets: What to plan for.
        source: For `load_unquantized`: dtype, revision, trust_remote_code.

    Raises:
        BudgetError: A budget is outside of what this model allows.
        InputError: There is no budget, or the model or the request is not usable.
    """
    if not budgets:
        raise InputError("a forecast needs a budget: give one or more, such as 4.5")
    if not distributed.leads():
        request = replace(request, say=distributed.silent, progress=False)
    started = time.perf_counter()
    request = replace(request, budget=None)
    loaded = opened(path_or_repo, request, **source)
    candidates, alone = request.candidates(loaded.model), request.alone(loaded.model)
    size = Size.of(loaded.model, candidates)
    for budget in budgets:
        check_budget(budget, size, candidates, request.pins)
    study = _studied(loaded, request)
    order = sorted(budgets, key=size.target)
    found = [search(study, budget, protect=request.protect) for budget in order]
    planned = time.perf_counter() - started
    plain = _uniforms(study)
    chosen = [*(plan.precisions for plan in found), *plain.values()]
    started = time.perf_counter()
    judged = compare(study.problem, chosen)
    each = (time.perf_counter() - started) / len(chosen)
    points = [
        _point(study, name, precisions, result.kl, result.perplexity_ratio)
        for name, precisions, result in zip(
            (*(plan.aim for plan in found), *map(str, plain)), chosen, judged, strict=True
        )
    ]
    plans = [
        replace(
            point,
            expected=sum(plan.sensitivities.values()) if request.refine else point.kl,
            plan=plan.beside(alone),
        )
        for point, plan in zip(points, found, strict=False)
    ]
    data = study.problem.calibration
    return Curve(
        name=path_or_repo,
        plans=tuple(plans),
        uniforms=tuple(sorted(points[len(found) :], key=lambda point: point.file_bytes)),
        original=size.files.original,
        text=data.source,
        tokens=data.held_out.size,
        effort=request.effort,
        expense=expense(study.problem, found[-1].precisions, planned, each),
    )


def _studied(loaded: Source, request: Request) -> Study:
    model, tokenizer = loaded.model, loaded.tokenizer
    return study_model(model, tokenizer, request, digest=loaded.digest, load=loaded.load)


def _point(study: Study, name: str, precisions: Precisions, kl: float, ratio: float) -> Point:
    bits, size = stored(study.problem.tensors, precisions), study.size
    return Point(name, size.bits_per_weight(bits), size.file_bytes(bits), kl, kl, ratio)


def _uniforms(study: Study) -> dict[Precision, Precisions]:
    """Stock's uniform quantizations at its default group size, or 32 where that does not fit."""
    tensors = study.problem.tensors
    group = 64 if all(t.own or Precision(4, 64).fits(t.shape) for t in tensors) else 32
    return {(p := Precision(bits, group)): uniformly(tensors, p) for bits in BITS}
