"""The two charts of a report, as inline SVG that takes its colours from the page."""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

from .evidence import Evidence
from .words import TIMES, nats, power, precision

# In the units of the viewBox; narrow, so that text stays legible when a phone scales it down.
WIDTH, HEIGHT = 460, 330
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 18, 46

Scale = Callable[[float], float]


def kl_chart(evidence: Evidence) -> str:
    """End-to-end KL against bits per weight: the uniform precisions, the plan and its budget.

    An empty string if no KL is above zero, which a logarithmic scale cannot show.
    """
    plan, bpw = evidence.plan, evidence.size.bits_per_weight
    points = [(bpw(j.stored_bits), j.kl, j.precision) for j in evidence.references]
    shown = [p for p in points if _drawable(p[1])]
    if not shown or not _drawable(evidence.kl):
        return ""
    xs = [*(p[0] for p in shown), plan.achieved_bpw, plan.target_bpw]
    y, low, high = _log_scale([*(p[1] for p in shown), evidence.kl])
    pad = 0.07 * (max(xs) - min(xs)) or 0.5
    x = _linear(min(xs) - pad, max(xs) + pad)
    parts = [_grid(y, low, high), _axis(x, _steps(min(xs) - pad, max(xs) + pad))]
    parts.append(_titles("stored bits per weight", "KL, nats per token"))
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
            + _label(x(width), y(kl), str(kind))
        )
    a, b = x(plan.achieved_bpw), y(evidence.kl)
    title = (
        f"this plan: {plan.achieved_bpw:.3f} bits per weight, KL {nats(evidence.kl)} nats per token"
    )
    parts.append(
        f'<path class="plan" d="M{a:.1f} {b - 8:.1f}l8 8-8 8-8-8z" '
        f'data-bpw="{plan.achieved_bpw!r}" data-kl="{evidence.kl!r}">'
        f"<title>{escape(title)}</title></path>" + _label(a, b, "this plan", "strong")
    )
    return _svg("KL against stored bits per weight", parts)


def sensitivity_chart(evidence: Evidence) -> str:
    """Sensitivities at the common precision in falling order, and those at the planned one.

    An empty string if no sensitivity is above zero.
    """
    curve, plan = evidence.curve, evidence.plan
    now = {t.path: plan.sensitivities[t.path] for t, _ in curve}
    values = [v for v in (*(c for _, c in curve), *now.values()) if _drawable(v)]
    if not any(_drawable(value) for _, value in curve):
        return ""
    y, low, high = _log_scale(values)
    x, floor = _linear(0.5, len(curve) + 0.5), HEIGHT - BOTTOM

    def height(value: float) -> float:
        return y(value) if _drawable(value) else floor

    parts = [_grid(y, low, high), _axis(x, _ranks(len(curve)))]
    parts.append(_titles("tensors, the most sensitive first", "KL, nats per token"))
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
    return _svg("Sensitivity of each tensor, sorted", parts)


def tone(bits: int) -> str:
    """The class that colours a width."""
    return f"b{bits}" if bits <= 8 else "b16"


def _drawable(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _linear(low: float, high: float) -> Scale:
    span = (WIDTH - LEFT - RIGHT) / (high - low)
    return lambda value: LEFT + (value - low) * span


def _log_scale(values: Iterable[float]) -> tuple[Scale, float, float]:
    """A vertical scale over positive values with some room, and its ends as exponents of ten."""
    logs = [math.log10(v) for v in values]
    room = max(0.08 * (max(logs) - min(logs)), 0.08)
    low, high = min(logs) - 1.6 * room, max(logs) + 1.4 * room
    span = (HEIGHT - TOP - BOTTOM) / (high - low)
    return (lambda value: HEIGHT - BOTTOM - (math.log10(value) - low) * span), low, high


def _grid(y: Scale, low: float, high: float) -> str:
    """Horizontal lines at powers of ten, and at 2 and 5 times them where there are few."""
    digits = (1,) if high - low > 2.5 else (1, 2, 5)
    if high - low < 0.4:
        digits = (1, 1.5, 2, 3, 4, 5, 6, 8)
    ticks = [
        (digit, exponent)
        for exponent in range(math.floor(low), math.ceil(high) + 1)
        for digit in digits
        if low <= exponent + math.log10(digit) <= high
    ]
    while len(ticks) > 9:
        ticks = ticks[::2]
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">'
        f"{_tick(digit, exponent, len(digits) == 1)}</text>"
        for digit, exponent in ticks
        for at in (y(digit * 10.0**exponent),)
    )


def _tick(digit: float, exponent: int, powers: bool) -> str:
    if powers:
        return power(exponent)
    if -3 < exponent < 4:
        return f"{digit * 10.0**exponent:g}"
    return power(exponent) if digit == 1 else f"{digit:g}{TIMES}{power(exponent)}"


def _axis(x: Scale, ticks: Sequence[float]) -> str:
    base = HEIGHT - BOTTOM
    line = f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>'
    return line + "".join(
        f'<line class="axis" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="{base}" y2="{base + 4}"/>'
        f'<text x="{x(t):.1f}" y="{base + 18}" text-anchor="middle">{t:g}</text>'
        for t in ticks
    )


def _steps(low: float, high: float) -> list[float]:
    """Round numbers between two ends, at most eight."""
    step = next(s for s in (0.1, 0.25, 0.5, 1, 2, 4) if (high - low) / s <= 8 or s == 4)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _ranks(count: int) -> list[float]:
    step = next(s * 10**e for e in range(9) for s in (1, 2, 5) if count / (s * 10**e) <= 7)
    return [1, *(r for r in range(step, count + 1, step) if r > 1 and r - 1 > step / 3)]


def _titles(horizontal: str, vertical: str) -> str:
    return (
        f'<text class="soft" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" '
        f'text-anchor="middle">{horizontal}</text>'
        f'<text class="soft" x="{LEFT + 4}" y="{TOP - 4}">{vertical}</text>'
    )


def _label(x: float, y: float, text: str, kind: str = "label") -> str:
    """A point's label: to its right and above, where a falling curve leaves room; the plan's below.

    Near the right edge it moves to the other side.
    """
    turn = -1 if kind == "strong" else 1
    side = turn if LEFT + 85 < x < WIDTH - RIGHT - 85 else 1 if x <= LEFT + 85 else -1
    anchor, rise = ("start" if side > 0 else "end"), (-6 if turn > 0 else 17)
    return (
        f'<text class="{kind}" x="{x + 9 * side:.1f}" y="{y + rise:.1f}" '
        f'text-anchor="{anchor}">{text}</text>'
    )


def _svg(title: str, parts: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        + "".join(parts)
        + "</svg>"
    )
