"""HTML taken apart."""

from html.parser import HTMLParser

VOID = {"meta", "wbr", "br", "link", "img"}


class Markup(HTMLParser):
    """Checks that elements nest, and collects them as (tag, attributes, text)."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.stack: list[int] = []
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} is given twice"
        if tag not in VOID:
            self.stack.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.elements[self.stack.pop()][0] == tag

    def handle_data(self, data):
        for index in self.stack:
            self.elements[index][2].append(data)

    def all(self, tag: str, **attributes: str):
        """Attributes and text of each such element; an attribute's underscore is a hyphen."""
        wanted = {name.replace("_", "-"): value for name, value in attributes.items()}
        return [
            (found, "".join(text))
            for name, found, text in self.elements
            if name == tag and all(found.get(k, "") == v for k, v in wanted.items())
        ]

    def cells(self) -> dict[str | None, dict[str, str | None]]:
        cells = [a for a, _ in self.all("td") if "data-path" in a]
        assert len(cells) == len({a["data-path"] for a in cells})
        return {a["data-path"]: a for a in cells}
