"""Plans for one budget, judged end to end; the best one is kept.

Sensitivities add up well at medium bits and less so below (IMPQ, arXiv 2509.15455). So a few plans
are allocated under different rules and judged on held-out calibration sequences. Below `REMEASURED`
bits per weight, plans from sensitivities that are re-measured around the best one are judged too.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from .._version import versions
from ..errors import BudgetError, InputError
from ..model.layers import decoder_layers, layer_index
from ..planning.allocation import allocate
from ..planning.budget import Budget
from .candidates import Size, Tensor
from .judgement import Judged, Judgements, Measure, Precisions
from .plan import Plan, Uniform
from .precision import BITS, GROUP_SIZES, Precision
from .sensitivity.interaction import SHARES, around
from .sensitivity.problem import Problem, Sensitivity, divergences

#: Whether a variant may give a tensor a precision.
Rule = Callable[[Tensor, Precision], bool]

PROTECTED = "protected"
#: Bits per weight below which a second round is measured around the first plan.
REMEASURED = 4.0


@dataclass(frozen=True)
class Study:
    """A measured model, from which plans for any budget are made quickly.

    Attributes:
        problem: The model, its weights and its calibration sequences.
        sensitivity: Expected KL of every tensor at every candidate precision, in nats per token.
        method: Name of the method that measured them.
    """

    problem: Problem
    sensitivity: Sensitivity
    method: str

    @property
    def size(self) -> Size:
        """The model's counts."""
        return self.problem.size


def search(
    study: Study,
    budget: float | Budget,
    *,
    protect: bool = False,
    remeasure_below: float = REMEASURED,
    measure: Measure = divergences,
) -> Plan:
    """Allocate a budget over measured tensors.

    Args:
        study: The measured model.
        budget: Bits per weight, or any `Budget`.
        protect: Whether the plan must keep the tensors at both ends at 8 bits or more.
        remeasure_below: Budget below which sensitivities are measured once more around the plan.
        measure: What judges plans.

    Returns:
        Of the plans in `variants`, those re-measured around the best of them, every uniform
        quantization and every plan judged earlier, the one with the least KL on the held-out
        sequences that fits the budget and the candidates; see `chosen`. Before a refinement this KL
        is not informative, because plain rounding is worst at the lowest bits and refinement
        improves these most. Then the plan with the least expected KL is returned.

    Raises:
        BudgetError: No plan fits, or none that protects both ends.
    """
    problem, size = study.problem, study.size
    limit, asked, budget = size.limit(budget), budget, size.target(budget)
    plans, judgements = _plans(study, budget, protect), Judgements(problem, measure)
    within, beyond = uniforms(problem.tensors, size, budget)
    beside = {
        f"uniform {p}": (p, size.bits_per_weight(bits))
        for p, bits in [*(within[-1:] if problem.refine else within), *beyond[:1]]
    }
    standard = {name: uniformly(problem.tensors, p) for name, (p, _) in beside.items()}
    found = judgements.of(plans | standard, budget)
    if budget < remeasure_below and not problem.refine:
        best = min(plans, key=lambda n: found[n].kl)
        more = remeasured(study, budget, best, plans)
        plans |= more
        found |= judgements.of(more, budget)
    judged = [Judged(n, plan, found[n]) for n, plan in plans.items()]
    if problem.refine:
        (plan,) = judged
    else:
        fits = _allowance(problem, size.room(budget), protect)
        known = [each for each in judgements if fits(each.precisions)]
        plan = chosen([*judged, *known], list(standard.values()))
        judgements.choose(plan.precisions)
    sides = [Uniform(p, bpw, found[n].kl) for n, (p, bpw) in beside.items()]
    below = [each for each in sides if each.bpw <= budget]
    above = [each for each in sides if each.bpw > budget]
    precisions, data, expected = plan.precisions, problem.calibration, study.sensitivity
    return Plan(
        precisions=precisions,
        sensitivities={path: expected[path].get(p, 0.0) for path, p in precisions.items()},
        method=study.method,
        target_bpw=budget,
        achieved_bpw=size.bits_per_weight(stored(problem.tensors, precisions)),
        kl=plan.verdict.kl,
        variant=plan.name,
        below=below[-1] if below else None,
        above=above[0] if above else None,
        calibration={
            "source": data.source,
            "sequences": len(data.tokens),
            "length": data.tokens.shape[1],
            "sha256": data.digest,
        },
        versions=versions(),
        notes=tuple(problem.findings.notes),
        budget="" if limit is None else str(asked),
        limit=limit,
    )


def _plans(study: Study, budget: float, protect: bool) -> dict[str, Precisions]:
    """The plans of `variants` to judge."""
    plans = variants(study, budget)
    if protect:
        if PROTECTED not in plans:
            raise BudgetError(
                f"a budget of {budget:g} bits per weight is too small to keep the first and last "
                "layer, embeddings and head at 8 bits: raise it or leave out --optiq-protect"
            )
        return {PROTECTED: plans[PROTECTED]}
    return {"allocated": plans["allocated"]} if study.problem.refine else plans


def chosen(plans: Sequence[Judged], standard: Sequence[Precisions]) -> Judged:
    """The plan to take of some that were judged.

    Args:
        plans: All that fit; of equal ones the first is taken.
        standard: Stock's uniform quantizations, which may be among them.

    Returns:
        The one with the least KL. It must beat the best uniform quantization beyond noise, else
        that one is taken, unless it is worse than what an earlier conversion ended with.
    """
    best = min(plans, key=lambda each: each.verdict.kl)
    plain = min(
        (each for each in plans if each.precisions in standard),
        key=lambda each: each.verdict.kl,
        default=best,
    )
    reached = min((each.verdict.kl for each in plans if each.chosen), default=math.inf)
    if best.verdict.beats(plain.verdict) or plain.verdict.kl > reached:
        return best
    return plain


def _allowance(problem: Problem, room: int, protect: bool) -> Callable[[Precisions], bool]:
    """Whether a plan takes no more stored bits than there are, and nothing that is no candidate."""
    rule = rules(problem)[PROTECTED if protect else "allocated"]

    def fits(plan: Precisions) -> bool:
        for tensor in problem.tensors:
            precision = plan[tensor.path]
            if tensor.pinned:
                if precision not in tensor.precisions:
                    return False
            elif precision not in (*tensor.precisions, tensor.own) or not rule(tensor, precision):
                return False
        return stored(problem.tensors, plan) <= room

    return fits


def remeasured(
    study: Study, budget: float, name: str, plans: dict[str, Precisions]
) -> dict[str, Precisions]:
    """Plans under the same rule, from sensitivities re-measured around a plan; new ones only."""
    known, more = list(plans.values()), {}
    rule = rules(study.problem)[name]
    for share, again in zip(
        SHARES, around(study.problem, study.sensitivity, plans[name]), strict=False
    ):
        plan = _allocated(replace(study, sensitivity=again), rule, budget)
        if plan not in known:
            known.append(plan)
            more[f"{name}, re-measured by {share:g}"] = plan
    return more


def stored(tensors: Iterable[Tensor], precisions: Precisions) -> int:
    """Stored bits of a plan's tensors."""
    return sum(t.stored_bits(precisions[t.path]) for t in tensors)


def variants(study: Study, budget: float) -> dict[str, Precisions]:
    """Plans by name: over all candidates, without the coarsest bits, and with both ends protected.

    A variant that the budget does not allow is left out.

    Raises:
        BudgetError: Not even the first one fits.
    """
    plans: dict[str, Precisions] = {}
    for name, rule in rules(study.problem).items():
        try:
            plans[name] = _allocated(study, rule, budget)
        except BudgetError:
            if name == "allocated":
                raise
    return plans


def rules(problem: Problem) -> dict[str, Rule]:
    """The precisions that each variant allows."""
    free = [t for t in problem.tensors if not t.pinned] or problem.tensors
    coarsest = min(p.bits for t in free for p in t.precisions)
    ends = protected(problem)
    return {
        "allocated": lambda tensor, precision: True,
        f"above {coarsest} bits": lambda tensor, precision: precision.bits > coarsest,
        PROTECTED: lambda tensor, precision: tensor.path not in ends or precision.bits >= 8,
    }


def protected(problem: Problem) -> set[str]:
    """Tensors outside the decoder layers, and those of the first and last layer."""
    index, last = layer_index(problem.model), len(decoder_layers(problem.model)) - 1
    return {t.path for t in problem.tensors if index.get(t.path) in (None, 0, last)}


def _allocated(study: Study, rule: Rule, budget: float) -> Precisions:
    tensors, expected = study.problem.tensors, study.sensitivity
    # A tensor without any allowed candidate keeps all of them.
    allowed = {
        t.path: [p for p in t.precisions if rule(t, p)] or list(t.precisions) for t in tensors
    }
    for tensor in tensors:
        for precision in allowed[tensor.path]:
            if not math.isfinite(value := expected[tensor.path][precision]):
                raise InputError(
                    f"the sensitivity of {tensor.path} at {precision} came out as {value}: its "
                    "weights are too large to compute with, or the method that measured it fails"
                )
    choice = allocate(
        [[expected[t.path][p] for p in allowed[t.path]] for t in tensors],
        [[t.stored_bits(p) for p in allowed[t.path]] for t in tensors],
        study.size.room(budget),
    )
    return {t.path: allowed[t.path][c] for t, c in zip(tensors, choice, strict=True)}


def uniforms(
    tensors: Iterable[Tensor], size: Size, budget: float
) -> tuple[list[tuple[Precision, int]], list[tuple[Precision, int]]]:
    """The uniform quantizations of ``mlx_lm.convert -q``, within a budget and above it.

    Returns:
        Two lists of precisions with the stored bits of all tensors together, by rising bits.
        Precisions whose groups do not divide every tensor are left out.
    """
    tensors, room = list(tensors), size.room(budget)
    sizes = {
        p: stored(tensors, uniformly(tensors, p))
        for p in (Precision(b, g) for b in BITS for g in GROUP_SIZES)
        if all(t.own or p.fits(t.shape) for t in tensors)
    }
    order = sorted(sizes.items(), key=lambda each: (each[1], each[0].bits))
    return [e for e in order if e[1] <= room], [e for e in order if e[1] > room]


def uniformly(tensors: Iterable[Tensor], precision: Precision) -> Precisions:
    """Stock's uniform quantization, which honours the model's own predicate."""
    return {t.path: t.own or precision for t in tensors}
