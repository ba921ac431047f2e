"""A plan for a distance from the original instead of a size: the smallest that is near enough."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from ...errors import BudgetError
from ...planning.calibration import DEFAULT
from ..plan import Plan
from ..plan_search import Study, search, stored, variants
from .certificate import Certificate

#: Sequences to plan with where a bound is asked for: every other one is held out for it.
CERTIFIED = replace(DEFAULT, count=64, held_out_every=2)
#: Bits per weight within which the smallest budget is found.
STEP = 0.05
#: Most conversions that are tried, if any of them is near enough.
MOST = 6
#: A KL that counts as none, in nats per token.
TINY = 1e-12

T = TypeVar("T")


def search_quality(
    study: Study,
    wanted: float,
    finish: Callable[[Plan], T],
    certify: Callable[[T], Certificate],
    *,
    protect: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[T, Certificate]:
    """The smallest finished conversion whose KL is at most as asked, and its certificate.

    The measured sensitivities predict the KL of a budget up to a factor, which each conversion that
    was tried corrects. The next budget is the one that then meets the bound, or the middle of those
    that are left.

    Args:
        study: The measured model.
        wanted: Most KL from the original in nats per token, for its bound.
        finish: Refines and distills a plan, as asked.
        certify: Measures what that returned.
        protect: Whether to protect both ends, as in `search`.
        say: Receives one line for each conversion that was tried.

    Raises:
        BudgetError: Not even the largest candidates come so near; the message says how near.
    """
    low, high = _range(study)
    say(f"[optiq] Up to {MOST} conversions are tried, each as long as one by budget")
    failing, passing, factor, tried = low - STEP, high, 1.0, 0
    best: tuple[T, Certificate] | None = None
    while best is None or (passing > low and passing - failing > STEP and tried < MOST):
        budget = high if tried >= MOST else _nearest(study, wanted / factor, low, high)
        if best is None:
            budget = max(budget, failing + STEP)
        elif passing - failing < 2 * STEP:
            budget = (failing + passing) / 2
        else:
            budget = min(max(budget, failing + STEP), passing - STEP)
        budget = min(max(budget, low), high)
        plan, tried = search(study, budget, protect=protect), tried + 1
        done = finish(plan)
        found = certify(done)
        say(
            f"[optiq] {plan.achieved_bpw:.3f} bits per weight: KL {found.kl:.4g}, at most "
            f"{found.bound:.4g} of {wanted:g}"
        )
        factor = max(found.bound, TINY) / max(_expected(study, budget), TINY)
        if found.bound <= wanted:
            passing, best = budget, (done, found)
        elif budget < high:
            failing = budget
        else:
            raise BudgetError(
                f"a KL of {wanted:g} nats per token is out of reach: at {plan.achieved_bpw:.3f} "
                f"bits per weight, the most of these candidates, it is {found.kl:.4g}, at most "
                f"{found.bound:.4g}; allow more, or give more --optiq-bits"
            )
    return best


def _range(study: Study) -> tuple[float, float]:
    """Bits per weight of the smallest and of the largest candidates."""
    tensors = study.problem.tensors
    ends = [stored(tensors, {t.path: t.precisions[at] for t in tensors}) for at in (0, -1)]
    return study.size.bits_per_weight(ends[0]), study.size.bits_per_weight(ends[1])


def _expected(study: Study, budget: float) -> float:
    """KL that the sensitivities predict for a budget, in nats per token."""
    plan = variants(study, budget)["allocated"]
    return sum(study.sensitivity[path].get(p, 0.0) for path, p in plan.items())


def _nearest(study: Study, wanted: float, low: float, high: float) -> float:
    """The smallest budget from ``low`` to ``high`` for which so much KL is predicted at most."""
    if _expected(study, low) <= wanted:
        return low
    while high - low > STEP / 4:
        middle = (low + high) / 2
        low, high = (low, middle) if _expected(study, middle) <= wanted else (middle, high)
    return high
