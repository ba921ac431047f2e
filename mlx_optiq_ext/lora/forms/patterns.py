r"""Module patterns of PEFT, matched without running the regular expressions of a file.

PEFT reads the keys of ``rank_pattern`` and ``alpha_pattern`` as regular expressions, tries them as
``(.*\.)?(KEY)$`` and uses the first match. A file's expression may take exponential time,
so none is run here. The usual patterns are supported: names and paths, which match the end of a
module's path; groups of alternatives, optional parts and character classes; ``\d+``
for a number between two dots; ``.*`` and ``.+``; ``^`` and ``$``. A dot stands for itself.
Source: huggingface/peft, ``get_pattern_key`` in src/peft/utils/other.py.
"""

import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from ...errors import InputError
from ...files import shown

#: Characters of a pattern that is more than a name, and of a module's path.
LONGEST = 300
#: Patterns of a table that are more than names, and names that one of them stands for.
COMPLEX, ALTERNATIVES = 100, 256
#: Patterns with ``.*`` or ``.+``, each of which is tried on every path.
WILD = 64
#: Comparisons of a table with a model's paths: about a second.
COMPARISONS = 4_000_000

# Placeholders for a number and for wildcards, which no path contains.
_NUMBER, _ANY, _SOME = "\0", "\1", "\2"
_PLAIN = re.compile(r"[\w.-]+", re.ASCII)
_WORDS = re.compile(r"[A-Za-z0-9_-]+(?![?*+{])|[A-Za-z0-9_-]")
_CLASS = re.compile(r"\[([A-Za-z0-9_-]{1,40})\]")
_MEANINGS = ((r"\d+", _NUMBER), ("[0-9]+", _NUMBER), (r"[\d]+", _NUMBER), (r"\d", "0123456789"))
_BESIDE_NUMBER = re.compile("[^.^]\0|\0[^.]")
_DIGITS = re.compile(r"(?<![^.])\d+(?![^.])")


class _Foreign(ValueError):
    pass


@dataclass(frozen=True)
class _Table:
    r"""Patterns by what they match; numbers are their positions in the file.

    Attributes:
        ends: The end of a path -> number of the first pattern.
        wholes: The whole of a path -> number of the first pattern.
        wild: Number, parts with the wildcards between, and whether they are the whole path.
        numbered: Whether there is a ``\d+``.
    """

    ends: Mapping[str, int]
    wholes: Mapping[str, int]
    wild: tuple[tuple[int, tuple[str, ...], bool], ...]
    numbered: bool

    def first(self, path: str) -> int | None:
        found: list[int] = []
        for spelling in _spellings(path) if self.numbered else (path,):
            if spelling in self.wholes:
                found.append(self.wholes[spelling])
            found.extend(self.ends[end] for end in _ends(spelling) if end in self.ends)
            found.extend(n for n, parts, whole in self.wild if _fits(spelling, parts, whole))
        return min(found, default=None)


def first_fits(keys: Collection[str], paths: Collection[str], source: str) -> dict[str, int]:
    """Which pattern of a table applies to each module.

    Args:
        keys: The patterns, in the file's order.
        paths: Paths of modules.
        source: For messages.

    Returns:
        Path -> number of the first pattern that fits; paths that none fits are left out.

    Raises:
        InputError: A pattern is not among those that this module's docstring lists, or there are
            too many to compare.
    """
    table = _compiled(keys, source) if keys else _Table({}, {}, (), False)
    if long := next((path for path in paths if len(path) > LONGEST), None):
        raise InputError(f"{source}: {shown(long)} is longer than any module's path")
    each = (8 if table.numbered else 1) * (1 + 3 * len(table.wild))
    if keys and sum(each + path.count(".") for path in paths) > COMPARISONS:
        raise InputError(
            f"{source}: {len(keys):,} patterns for {len(paths):,} modules are too many to compare: "
            "list modules by their names"
        )
    found = ((path, table.first(path)) for path in paths)
    return {path: number for path, number in found if number is not None}


def _compiled(keys: Collection[str], source: str) -> _Table:
    ends: dict[str, int] = {}
    wholes: dict[str, int] = {}
    wild: list[tuple[int, tuple[str, ...], bool]] = []
    more = 0
    for number, key in enumerate(keys):
        text = key.removesuffix("$").replace("\\.", ".")
        if _PLAIN.fullmatch(text.removeprefix("^")):
            texts = [text]
        else:
            texts, more = _names(key, source), more + 1
        for text in texts:
            name = text.removeprefix("^")
            if _ANY in name or _SOME in name:
                wild.append((number, tuple(re.split("([\1\2])", name)), name != text))
            else:
                (ends if name == text else wholes).setdefault(name, number)
        if more > COMPLEX or len(wild) > WILD:
            raise InputError(
                f"{source}: more than {COMPLEX} patterns are more than names, or {WILD} have .* or "
                ".+ in them: list modules by their names"
            )
    numbered = any(_NUMBER in text for text in itertools.chain(ends, wholes))
    return _Table(
        ends, wholes, tuple(wild), numbered or any(_NUMBER in "".join(w[1]) for w in wild)
    )


def _names(key: str, source: str) -> list[str]:
    """The names that a pattern matches; names anchored at the start begin with ``^``."""
    try:
        if len(key) > LONGEST:
            raise _Foreign("is too long")
        texts, at = _choice(key, 0, 0)
        if at != len(key):
            raise _Foreign("closes a bracket that is not open")
        found = [text.removesuffix("$") for text in texts]
        if any("^" in text[1:] or "$" in text for text in found):
            raise _Foreign("has ^ or $ within")
        if any(_BESIDE_NUMBER.search(text) for text in found):
            raise _Foreign("has a number that is not between dots")
    except _Foreign as error:
        raise InputError(
            f"{source}: pattern {shown(key)} {error}; patterns of files are not run as regular "
            r"expressions: name modules by the end of their path, with (a|b), \d+, .*, ^ and $"
        ) from error
    return found


def _choice(key: str, at: int, depth: int) -> tuple[list[str], int]:
    """Alternatives from ``at`` to a closing bracket or the end."""
    if depth > 8:
        raise _Foreign("has brackets within brackets")
    found: list[str] = []
    texts = [""]
    while at < len(key) and key[at] != ")":
        if key[at] == "|":
            found, texts, at = found + texts, [""], at + 1
            continue
        part, at = _part(key, at, depth)
        if key.startswith("?", at):
            part, at = ["", *part], at + 1
        if at < len(key) and key[at] in "*+?{":
            raise _Foreign(f"repeats a part ({key[at]})")
        if len(texts) * len(part) + len(found) > ALTERNATIVES:
            raise _Foreign("has too many alternatives")
        texts = [first + second for first, second in itertools.product(texts, part)]
    return found + texts, at


def _part(key: str, at: int, depth: int) -> tuple[list[str], int]:
    """Parse the part at ``at``: its alternatives, and the start of the next part."""
    if key[at] == "(":
        start = at + (3 if key.startswith("(?:", at) else 1)
        texts, end = _choice(key, start, depth + 1)
        if end == len(key):
            raise _Foreign("has an open bracket")
        return texts, end + 1
    for written, meaning in _MEANINGS:
        if key.startswith(written, at):
            return list(meaning), at + len(written)
    for written, meaning in ((".*?", _ANY), (".*", _ANY), (".+?", _SOME), (".+", _SOME)):
        if key.startswith(written, at):
            return [meaning], at + len(written)
    if key.startswith((r"\.", r"\-", r"\_"), at):
        return [key[at + 1]], at + 2
    if found := _WORDS.match(key, at):
        return [found[0]], found.end()
    if key[at] in ".^$":
        return [key[at]], at + 1
    if found := _CLASS.match(key, at):
        return _members(found[1]), found.end()
    raise _Foreign(f"has {shown(key[at : at + 2])} in it")


def _members(text: str) -> list[str]:
    """The characters of a class such as ``0-3`` or ``qkv``."""
    found: list[str] = []
    for first, last, single in re.findall(r"(\w)-(\w)|([\w-])", text):
        if single:
            found.append(single)
        else:
            found.extend(map(chr, range(ord(first), ord(last) + 1)))
    if not found:
        raise _Foreign(f"has an empty class [{text}]")
    return sorted(set(found))


def _spellings(path: str) -> Iterator[str]:
    r"""A path as it is, and with each choice of its numbers as ``\d+`` would have them."""
    places = [match.span() for match in _DIGITS.finditer(path)][:3]
    for chosen in itertools.product((False, True), repeat=len(places)):
        text = path
        for (start, end), replaced in reversed(list(zip(places, chosen, strict=True))):
            if replaced:
                text = text[:start] + _NUMBER + text[end:]
        yield text


def _ends(path: str) -> Iterator[str]:
    """A path and what follows each of its dots."""
    yield path
    for match in re.finditer(r"\.", path):
        yield path[match.end() :]


def _fits(path: str, parts: tuple[str, ...], whole: bool) -> bool:
    """Whether a path, or its end behind a dot, is ``parts`` with wildcards between."""
    first, last = parts[0], parts[-1]
    if not path.endswith(last):
        return False
    starts = [0] if whole else [0, *(match.end() for match in re.finditer(r"\.", path))]
    # The first of several matches leaves the most for the wildcards.
    at = next((start for start in starts if path.startswith(first, start)), None)
    if at is None:
        return False
    at += len(first)
    for wildcard, part in zip(parts[1:-2:2], parts[2:-2:2], strict=True):
        at = path.find(part, at + (wildcard == _SOME))
        if at < 0:
            return False
        at += len(part)
    return at + (parts[-2] == _SOME) <= len(path) - len(last)
