"""The two charts of a report, as inline SVG that takes its colours from the page."""

from html import escape

from .axes import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    axis,
    drawable,
    grid,
    label,
    linear,
    log_scale,
    steps,
    svg,
    titles,
)
from .evidence import Evidence
from .words import nats, precision


def kl_chart(evidence: Evidence) -> str:
    """End-to-end KL against bits per weight: the uniform precisions, the plan and its budget.

    An empty string if no KL is above zero, which a logarithmic scale cannot show.
    """
    plan, bpw = evidence.plan, evidence.size.bits_per_weight
    points = [(bpw(j.stored_bits), j.kl, j.precision) for j in evidence.references]
    shown = [p for p in points if drawable(p[1])]
    if not shown or not drawable(evidence.kl):
        return ""
    xs = [*(p[0] for p in shown), plan.achieved_bpw, plan.target_bpw]
    y, low, high = log_scale([*(p[1] for p in shown), evidence.kl])
    pad = 0.07 * (max(xs) - min(xs)) or 0.5
    x = linear(min(xs) - pad, max(xs) + pad)
    parts = [grid(y, low, high), axis(x, steps(min(xs) - pad, max(xs) + pad))]
    parts.append(titles("stored bits per weight", "KL, nats per token"))
    budget = x(plan.target_bpw)
    left = budget < WIDTH - 90
    free = y(evidence.kl) < HEIGHT - BOTTOM - 40  # otherwise the plan's label is there
    parts.append(
        f'<line class="budget" x1="{budget:.1f}" x2="{budget:.1f}" y1="{TOP}" '
        f'y2="{HEIGHT - BOTTOM}"><title>budget: {plan.target_bpw:g} bits per weight</title></line>'
        f'<text class="soft" x="{budget + (5 if left else -5):.1f}" '
        f'y="{HEIGHT - BOTTOM - 6 if free else TOP + 12}" '
        f'text-anchor="{"start" if left else "end"}">budget</text>'
    )
    line = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b, _ in shown)
    parts.append(f'<polyline class="line" points="{line}"/>')
    for width, kl, kind in shown:
        title = f"uniform {kind}: {width:.3f} bits per weight, KL {nats(kl)} nats per token"
        parts.append(
            f'<circle class="uniform" cx="{x(width):.1f}" cy="{y(kl):.1f}" r="5" '
            f'data-bpw="{width!r}" data-kl="{kl!r}"><title>{escape(title)}</title></circle>'
            + label(x(width), y(kl), str(kind))
        )
    a, b = x(plan.achieved_bpw), y(evidence.kl)
    title = (
        f"this plan: {plan.achieved_bpw:.3f} bits per weight, KL {nats(evidence.kl)} nats per token"
    )
    parts.append(
        f'<path class="plan" d="M{a:.1f} {b - 8:.1f}l8 8-8 8-8-8z" '
        f'data-bpw="{plan.achieved_bpw!r}" data-kl="{evidence.kl!r}">'
        f"<title>{escape(title)}</title></path>" + label(a, b, "this plan", "strong")
    )
    return svg("KL against stored bits per weight", parts)


def sensitivity_chart(evidence: Evidence) -> str:
    """Sensitivities at the common precision in falling order, and those at the planned one.

    An empty string if no sensitivity is above zero.
    """
    curve, plan = evidence.curve, evidence.plan
    now = {t.path: plan.sensitivities[t.path] for t, _ in curve}
    values = [v for v in (*(c for _, c in curve), *now.values()) if drawable(v)]
    if not any(drawable(value) for _, value in curve):
        return ""
    y, low, high = log_scale(values)
    x, floor = linear(0.5, len(curve) + 0.5), HEIGHT - BOTTOM

    def height(value: float) -> float:
        return y(value) if drawable(value) else floor

    parts = [grid(y, low, high), axis(x, _ranks(len(curve)))]
    parts.append(titles("tensors, the most sensitive first", "KL, nats per token"))
    line = " ".join(f"{x(i):.1f},{height(value):.1f}" for i, (_, value) in enumerate(curve, 1))
    parts.append(f'<polyline class="line" points="{line}"/>')
    radius = min(5.0, max(2.2, 0.36 * (WIDTH - LEFT - RIGHT) / len(curve)))
    for place, (tensor, value) in enumerate(curve, 1):
        here, chosen = now[tensor.path], plan.precisions[tensor.path]
        title = (
            f"{tensor.path}: {nats(value)} at {evidence.common}, {nats(here)} as planned "
            f"({precision(chosen)})"
        )
        parts.append(
            f'<g data-path="{escape(tensor.path)}" data-sensitivity="{value!r}">'
            f"<title>{escape(title)}</title>"
            f'<line class="stem" x1="{x(place):.1f}" x2="{x(place):.1f}" y1="{height(value):.1f}" '
            f'y2="{height(here):.1f}"/>'
            f'<circle class="dot {tone(chosen.bits)}" cx="{x(place):.1f}" '
            f'cy="{height(here):.1f}" r="{radius:.1f}"/></g>'
        )
    return svg("Sensitivity of each tensor, sorted", parts)


def tone(bits: int) -> str:
    """The class that colours a width."""
    return f"b{bits}" if bits <= 8 else "b16"


def _ranks(count: int) -> list[float]:
    step = next(s * 10**e for e in range(9) for s in (1, 2, 5) if count / (s * 10**e) <= 7)
    return [1, *(r for r in range(step, count + 1, step) if r > 1 and r - 1 > step / 3)]
