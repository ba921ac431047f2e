"""Places labels beside the points of a chart so that none covers another or a point."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from ..report.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH

#: Half the width of a point, the height of a line, and the width of a character.
POINT, LINE, CHARACTER = 7.0, 13.0, 7.2


@dataclass(frozen=True)
class Box:
    """A rectangle of a chart, in the units of its viewBox."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Box") -> bool:
        """Whether both share some area."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    @property
    def inside(self) -> bool:
        """Whether it is within the axes."""
        across = self.left >= LEFT - 2 and self.right <= WIDTH - RIGHT + 2
        return across and self.top >= TOP - LINE and self.bottom <= HEIGHT - BOTTOM


def labels(points: Sequence[tuple[float, float, str, str]]) -> str:
    """Labels as SVG; one that fits nowhere is left out.

    Args:
        points: Horizontal and vertical place, text and class of each point; the first are placed
            first.
    """
    taken = [Box(x - POINT, y - POINT, x + POINT, y + POINT) for x, y, _, _ in points]
    parts = []
    for x, y, text, kind in points:
        places = _places(x, y, len(text) * CHARACTER, above=kind == "label")
        found = next(
            (each for each in places if each.inside and not any(map(each.meets, taken))), None
        )
        if found is not None:
            taken.append(found)
            parts.append(
                f'<text class="{kind}" x="{found.left:.1f}" y="{found.bottom - 3:.1f}">'
                f"{escape(text)}</text>"
            )
    return "".join(parts)


def _places(x: float, y: float, width: float, *, above: bool) -> Iterable[Box]:
    """Where a label may go: on both sides of a point, above or below it first."""
    for high in (above, not above):
        top = y - POINT - LINE + 3 if high else y + POINT - 3
        for left in (
            (x + POINT + 1, x - POINT - 1 - width)
            if high
            else (
                x - POINT - 1 - width,
                x + POINT + 1,
            )
        ):
            yield Box(left, top, left + width, top + LINE)
    for top in (y - POINT - LINE, y + POINT):
        yield Box(x - width / 2, top, x + width / 2, top + LINE)
