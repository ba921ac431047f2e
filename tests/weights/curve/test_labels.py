"""Labels of a chart: none covers another or a point."""

from itertools import combinations
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from mlx_optiq_ext.weights.curve.labels import CHARACTER, LINE, POINT, Box, labels
from mlx_optiq_ext.weights.report.axes import HEIGHT, WIDTH

places = st.tuples(
    st.floats(60, WIDTH - 20),
    st.floats(20, HEIGHT - 50),
    st.text("0123456789-bitg", min_size=1, max_size=12),
    st.sampled_from(["label", "strong"]),
)


def boxes(svg: str) -> list[Box]:
    found = ElementTree.fromstring(f"<g>{svg}</g>")
    return [
        Box(x := float(each.attrib["x"]), y - LINE, x + len(each.text or "") * CHARACTER, y)
        for each in found
        for y in (float(each.attrib["y"]) + 3,)
    ]


@given(st.lists(places, max_size=9))
def test_no_label_meets_another_or_a_point(points):
    found = boxes(labels(points))
    near = 0.2  # coordinates are written with one digit
    shrunk = [Box(b.left + near, b.top + near, b.right - near, b.bottom - near) for b in found]
    dots = [Box(x - POINT, y - POINT, x + POINT, y + POINT) for x, y, _, _ in points]
    assert not any(a.meets(b) for a, b in combinations(shrunk, 2))
    assert not any(a.meets(b) for a in shrunk for b in dots)


def test_one_point_has_its_label_on_either_side():
    for x in (70.0, 200.0, WIDTH - 20.0):
        assert "4-bit g64" in labels([(x, 150.0, "4-bit g64", "label")])
    assert "&lt;b&gt;" in labels([(200.0, 150.0, "<b>", "label")])
