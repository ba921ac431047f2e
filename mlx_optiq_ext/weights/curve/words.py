"""A forecast for the terminal."""

from ...planning.budget import size_text
from ...planning.calibration import on
from ..request import DISTILL, PLAN
from .points import Curve, Point


def summary(curve: Curve) -> str:
    """A few lines about one plan, or a table of several with uniform quantizations beside them."""
    first, *others = curve.plans
    lines = _table(curve) if others else _single(curve, first)
    spent = curve.expense
    further = f"about {spent.further:.0f} s" if spent.further >= 1 else "less than a second"
    what = "each conversion takes" if others else "a conversion takes"
    if curve.effort == DISTILL:
        further += ", and distillation, which says its time after its first steps"
    return "\n".join(
        [
            *(f"[optiq] {line}" for line in lines),
            f"[optiq] Planned in {spent.planned:.1f} s, which is kept; {what} {further} more, and "
            f"{spent.memory / 2**30:.2f} GiB of memory",
            "[optiq] Nothing was converted",
        ]
    )


def _single(curve: Curve, point: Point) -> list[str]:
    plan = point.plan
    assert plan is not None, "the first points are plans"
    first = plan.summary().splitlines()[0].removeprefix("[optiq] ")
    lines = [
        first,
        f"Weight files: {size_text(point.file_bytes)} at most, of {size_text(curve.original)} in "
        "16 bits",
    ]
    judged = (
        f"KL {point.kl:.4g} nats per token, perplexity x {point.perplexity_ratio:.4g}, on "
        f"{_text(curve)}"
    )
    if curve.effort == PLAN:
        return [*lines, f"Expected: {judged}"]
    return [
        *lines,
        f"Expected after refinement: KL {point.expected:.4g} nats per token, by the sensitivities",
        f"Rounded as MLX rounds: {judged}",
    ]


def _table(curve: Curve) -> list[str]:
    refined = curve.effort != PLAN
    head = ["budget", "bits per weight", "weight files", "expected KL"]
    head += ["KL before it", "perplexity before it"] if refined else ["perplexity"]
    rows = sorted((*curve.plans, *curve.uniforms), key=lambda point: (point.file_bytes, point.name))
    cells = [head, *(_cells(point, refined) for point in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    said = f"KL in nats per token and perplexity over that of the original, on {_text(curve)}"
    if refined:
        said += "; expected: what the sensitivities predict to be left after refinement"
    return [*lines, said]


def _cells(point: Point, refined: bool) -> list[str]:
    name = point.name if point.plan is not None else f"uniform {point.name}"
    size = size_text(point.file_bytes)
    cells = [name, f"{point.bpw:.3f}", size, f"{point.expected:.4g}"]
    ratio = f"x {point.perplexity_ratio:.4g}"
    return [*cells, f"{point.kl:.4g}", ratio] if refined else [*cells, ratio]


def _text(curve: Curve) -> str:
    return f"{curve.tokens:,} held-out tokens {on(curve.text)}"
