"""Axes, grids and labels of charts, as SVG that takes its colours from where it stands."""

import math
from collections.abc import Callable, Iterable, Sequence

from .words import TIMES, power

# In the units of the viewBox; narrow, so that text stays legible when a phone scales it down.
WIDTH, HEIGHT = 460, 330
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 18, 46

Scale = Callable[[float], float]


def drawable(value: float) -> bool:
    """Whether a logarithmic scale can show a value."""
    return math.isfinite(value) and value > 0


def linear(low: float, high: float) -> Scale:
    """A horizontal scale between two values."""
    span = (WIDTH - LEFT - RIGHT) / (high - low)
    return lambda value: LEFT + (value - low) * span


def log_scale(values: Iterable[float]) -> tuple[Scale, float, float]:
    """A vertical scale over positive values with some room, and its ends as exponents of ten."""
    logs = [math.log10(v) for v in values]
    room = max(0.08 * (max(logs) - min(logs)), 0.08)
    low, high = min(logs) - 1.6 * room, max(logs) + 1.4 * room
    span = (HEIGHT - TOP - BOTTOM) / (high - low)
    return (lambda value: HEIGHT - BOTTOM - (math.log10(value) - low) * span), low, high


def grid(y: Scale, low: float, high: float) -> str:
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


def axis(x: Scale, ticks: Sequence[float]) -> str:
    """The horizontal axis with its ticks."""
    base = HEIGHT - BOTTOM
    line = f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>'
    return line + "".join(
        f'<line class="axis" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="{base}" y2="{base + 4}"/>'
        f'<text x="{x(t):.1f}" y="{base + 18}" text-anchor="middle">{t:g}</text>'
        for t in ticks
    )


def steps(low: float, high: float) -> list[float]:
    """Round numbers between two ends, at most eight."""
    step = next(s for s in (0.1, 0.25, 0.5, 1, 2, 4) if (high - low) / s <= 8 or s == 4)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def titles(horizontal: str, vertical: str) -> str:
    """What the two axes show."""
    return (
        f'<text class="soft" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" '
        f'text-anchor="middle">{horizontal}</text>'
        f'<text class="soft" x="{LEFT + 4}" y="{TOP - 4}">{vertical}</text>'
    )


def label(x: float, y: float, text: str, kind: str = "label") -> str:
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


def svg(title: str, parts: Iterable[str]) -> str:
    """A chart for a page."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        + "".join(parts)
        + "</svg>"
    )
