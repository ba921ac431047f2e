"""The report in a real browser."""

import dataclasses
import struct
import zlib

import pytest

from mlx_optiq_ext.weights import report

from . import browser

NAME = """<script>alert("x")</script> & 'co'"""


@pytest.mark.browser
@pytest.mark.skipif(browser.find() is None, reason="no Chromium is installed")
def test_a_real_browser_shows_the_page(evidence, tmp_path):
    path = tmp_path / "plan.html"
    report.write(path, dataclasses.replace(evidence, name=NAME))
    with browser.browser(tmp_path / "profile") as page:
        page.open(path)
        backgrounds = {}
        for width, scheme, media in (
            (1280, "light", "screen"),
            (1280, "dark", "screen"),
            (390, "light", "screen"),
            (390, "dark", "screen"),
            (700, "dark", "print"),
        ):
            page.show(width, scheme, media)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            backgrounds[scheme, media] = page.evaluate(
                "getComputedStyle(document.body).backgroundColor"
            )
            assert lines(page.screenshot()) > 200
        assert backgrounds["light", "screen"] != backgrounds["dark", "screen"]
        assert backgrounds["dark", "print"] == "rgb(255, 255, 255)"
        cells = page.evaluate("document.querySelectorAll('td[data-bits]').length")
        assert cells == len(evidence.tensors)
        assert page.evaluate("document.querySelector('h1').textContent") == NAME
        colours = page.evaluate(
            "[...document.querySelectorAll('td[data-bits]')].map(c => [c.dataset.bits, "
            "getComputedStyle(c.querySelector('.cell')).backgroundColor])"
        )
        assert len({tuple(c) for c in colours}) == len({bits for bits, _ in colours})
        assert page.complaints == []
        assert page.requests == [path.resolve().as_uri()]


def lines(png: bytes) -> int:
    """How many different scan lines a PNG has; an empty page has hardly any."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    position, width, data = 8, 0, b""
    while position < len(png):
        length, kind = struct.unpack(">I4s", png[position : position + 8])
        body = png[position + 8 : position + 8 + length]
        if kind == b"IHDR":
            width, depth, colour = struct.unpack(">I4xBB", body[:10])
            assert depth == 8
            width *= {2: 3, 6: 4}[colour]
        elif kind == b"IDAT":
            data += body
        position += length + 12
    raw = zlib.decompress(data)
    return len({raw[i : i + width + 1] for i in range(0, len(raw), width + 1)})
