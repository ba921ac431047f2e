"""The fenced blocks of the documentation, and the words of the commands in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: Stands before a block whose commands are not run, with the reason.
MARK = "<!-- parsed only: "


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: Name of its page, without the suffix.
        line: Number of its first line in the page.
        language: What stands behind its fence; empty for commands.
        text: What it holds.
        reason: Why it is not run; empty if it is.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str

    def __str__(self) -> str:
        return f"{self.page}-{self.line}"

    def commands(self) -> list[list[str]]:
        """The words of each command, in order."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [shlex.split(part) for line in lines for part in line.split(" && ")]


def blocks() -> list[Block]:
    """Every fenced block of the README and of ``docs``."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [block for page in pages for block in _of(page)]


def _of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"(?ms)^(?:<!-- ([^\n]+) -->\n)?```(\w*)\n(.*?)^```$", text):
        before, language, inside = found.groups()
        marked = f"<!-- {before}".startswith(MARK)
        yield Block(
            page.stem,
            text.count("\n", 0, found.start(3)) + 1,
            language,
            inside,
            f"<!-- {before}".removeprefix(MARK) if marked else "",
        )
