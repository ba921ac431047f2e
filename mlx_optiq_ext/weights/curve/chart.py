"""A forecast as one SVG: KL and perplexity against the size of the weight files."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ...planning.budget import UNITS, size_text
from ..report.axes import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    axis,
    drawable,
    grid,
    linear,
    log_scale,
    titles,
)
from ..report.page import write_document
from ..report.words import nats
from ..request import PLAN
from .labels import labels
from .points import Curve, Point

#: Height of the heading.
HEAD = 54
#: Colours and type of the report's page.
STYLE = """
svg { --page: #ffffff; --ink: #16202c; --soft: #566476; --rule: #dde2e9; --accent: #c2410c;
  --line: #7a8aa0; font: 12.5px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
@media (prefers-color-scheme: dark) { svg { --page: #151c25; --ink: #e7ecf2; --soft: #9aa8b9;
  --rule: #2a3542; --accent: #fb923c; --line: #8797ab; } }
.page { fill: var(--page); } text { fill: var(--ink); } .head { font-weight: 650; font-size: 14px; }
.soft { fill: var(--soft); } .strong { fill: var(--accent); font-weight: 650; }
.label, .strong { paint-order: stroke; stroke: var(--page); stroke-width: 4px;
  stroke-linejoin: round; }
.grid { stroke: var(--rule); } .axis { stroke: var(--line); }
.line, .way { fill: none; stroke: var(--line); stroke-width: 1.75; } .way { stroke: var(--accent); }
.uniform { fill: var(--page); stroke: var(--line); stroke-width: 2.5; }
.plan { fill: var(--accent); stroke: var(--page); stroke-width: 1.5; }
"""


@dataclass(frozen=True)
class Panel:
    """One of the charts.

    Attributes:
        title: What its vertical axis shows.
        value: Of a point.
        words: The value in words.
    """

    title: str
    value: Callable[[Point], float]
    words: Callable[[float], str]


def write(path: Path, curve: Curve) -> None:
    """Write the SVG, completely or not at all.

    Raises:
        InputError: The file cannot be written.
    """
    write_document(path, drawn(curve), "drawing")


def drawn(curve: Curve) -> str:
    """The SVG document, which follows the reader's light or dark scheme.

    The uniform quantizations next to the plans' sizes are drawn and those between them.
    """
    refined = curve.effort != PLAN
    panels = (
        Panel(
            "KL, nats per token" + ", expected of the plans" * refined,
            lambda point: point.expected,
            lambda value: f"KL {nats(value)} nats per token",
        ),
        Panel(
            "perplexity over that of the original" + ", before refinement" * refined,
            lambda point: point.perplexity_ratio,
            lambda value: f"perplexity x {value:.4g}",
        ),
    )
    shown = [panel for panel in panels if any(drawable(panel.value(p)) for p in curve.plans)]
    height = HEAD + HEIGHT * len(shown)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(curve.name)}: KL and perplexity by size</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}"/>',
        f'<text class="head" x="14" y="20">{escape(_short(curve.name))}</text>',
        '<text class="soft" x="14" y="36">plans (diamonds) and uniform quantization (circles)'
        "</text>",
        f'<text class="soft" x="14" y="51">on {curve.tokens:,} held-out tokens, '
        f"{escape(_short(curve.text))}</text>",
    ]
    for place, panel in enumerate(shown):
        inside = "".join(_panel(curve, panel))
        parts.append(f'<g transform="translate(0,{HEAD + HEIGHT * place})">{inside}</g>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(curve: Curve, panel: Panel) -> list[str]:
    plans = [point for point in curve.plans if drawable(panel.value(point))]
    uniforms = [point for point in _beside(curve) if drawable(panel.value(point))]
    unit = next(u for u in ("GB", "MB", "KB") if curve.original >= UNITS[u] or u == "KB")
    sizes = [point.file_bytes / UNITS[unit] for point in (*plans, *uniforms)]
    room = 0.09 * (max(sizes) - min(sizes)) or max(sizes) / 10
    x = linear(min(sizes) - room, max(sizes) + room)
    y, lines = _upright([panel.value(point) for point in (*plans, *uniforms)])
    ticks = _ticks(min(sizes) - room, max(sizes) + room)
    parts = [lines, axis(x, ticks), titles(f"weight files, {unit}", panel.title)]

    def at(point: Point) -> tuple[float, float]:
        return x(point.file_bytes / UNITS[unit]), y(panel.value(point))

    parts += [_line(uniforms, at, "line"), _line(plans, at, "way")]
    for point in uniforms:
        a, b = at(point)
        parts.append(
            f'<circle class="uniform" cx="{a:.1f}" cy="{b:.1f}" r="5" {_data(point, panel)}>'
            f"<title>uniform {_title(point, panel)}</title></circle>"
        )
    for point in plans:
        a, b = at(point)
        parts.append(
            f'<path class="plan" d="M{a:.1f} {b - 8:.1f}l8 8-8 8-8-8z" {_data(point, panel)}>'
            f"<title>budget {_title(point, panel)}</title></path>"
        )
    named = [(*at(point), point.name, "strong") for point in plans]
    return [*parts, labels([*named, *((*at(point), point.name, "label") for point in uniforms)])]


def _upright(values: list[float]) -> tuple[Scale, str]:
    """A vertical scale and its lines: logarithmic where values differ by more than threefold."""
    if max(values) > 3 * min(values):
        y, low, high = log_scale(values)
        return y, grid(y, low, high)
    room = 0.15 * (max(values) - min(values)) or 0.1 * max(values)
    low, high = min(values) - room, max(values) + room
    each = (HEIGHT - TOP - BOTTOM) / (high - low)

    def scale(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) * each

    return scale, "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{scale(tick):.1f}" '
        f'y2="{scale(tick):.1f}"/><text x="{LEFT - 7}" y="{scale(tick) + 4:.1f}" '
        f'text-anchor="end">{tick:g}</text>'
        for tick in _ticks(low, high)
    )


def _beside(curve: Curve) -> list[Point]:
    """The uniform quantizations from the next smaller one to the next larger one."""
    least, most = (point.file_bytes for point in (curve.plans[0], curve.plans[-1]))
    below = [p for p in curve.uniforms if p.file_bytes <= least][-1:]
    above = [p for p in curve.uniforms if p.file_bytes >= most][:1]
    between = [p for p in curve.uniforms if least < p.file_bytes < most]
    return [*below, *between, *(p for p in above if p not in below)]


def _line(points: Sequence[Point], at: Callable[[Point], tuple[float, float]], kind: str) -> str:
    places = " ".join(f"{a:.1f},{b:.1f}" for a, b in map(at, points))
    return f'<polyline class="{kind}" points="{places}"/>' if len(points) > 1 else ""


def _data(point: Point, panel: Panel) -> str:
    return f'data-bytes="{point.file_bytes}" data-value="{panel.value(point)!r}"'


def _title(point: Point, panel: Panel) -> str:
    words = panel.words(panel.value(point))
    return escape(f"{point.name}: {size_text(point.file_bytes)}, {words}")


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two ends, at most seven."""
    rough = (high - low) / 6
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [float(f"{number * step:.6g}") for number in range(first, last + 1)]


def _short(text: str) -> str:
    return text if len(text) <= 56 else f"...{text[-53:]}"
