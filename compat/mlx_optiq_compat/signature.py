"""Recorded signatures of mlx-lm's sources, and their comparison with the installed release.

`source` says what a name and its signature are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from .matrix import supported
from .source import module_signatures
from .version import package_folder

FILE = Path(__file__).with_name("signatures.json")

Recorded = dict[str, dict[str, str]]
"""Target to signature to the releases that have it, as in signatures.json."""


def matching(targets: Iterable[str]) -> list[str]:
    """Compare the installed mlx-lm with the recorded signatures.

    The source files are read, never imported.

    Args:
        targets: What a feature patches or uses, as ``"module:qualname"``.

    Returns:
        One sentence per target that is missing or looks like no supported release; empty when
        every target matches one.

    Raises:
        ValueError: A target is not of the form ``"module:qualname"``.
    """
    folder = package_folder()
    complaints: list[str] = []
    live: dict[str, dict[str, str]] = {}
    for target in targets:
        module, colon, qualname = target.partition(":")
        if not (module and colon and qualname):
            raise ValueError(f"not a target: {target!r}; expected 'module:qualname'")
        if folder is None:
            complaints.append(f"{target} is missing: mlx-lm is not installed")
            continue
        if module not in live:
            try:
                live[module] = module_signatures(folder, module)
            except (OSError, SyntaxError, ValueError) as error:
                complaints.append(f"{target} is missing: {module} cannot be read ({error})")
                continue
        complaint = _complaint(target, live[module].get(qualname))
        if complaint:
            complaints.append(complaint)
    return complaints


@cache
def recorded() -> tuple[tuple[str, ...], Recorded]:
    """The releases that signatures.json covers, oldest first, and what it says of each target."""
    data = json.loads(FILE.read_text(encoding="utf-8"))
    return tuple(data["releases"]), data["signatures"]


def spans(versions: Iterable[str], releases: tuple[str, ...]) -> str:
    """Shorten a list of releases: ``"0.30.4..0.31.3, 0.32.1.."``.

    A span without an end lasts to the newest release recorded, so that recording one more
    touches only the lines that changed.

    Args:
        versions: Some of the releases.
        releases: All releases, oldest first.

    Returns:
        The spans, separated by commas.
    """
    wanted, parts, start = set(versions), list[str](), None
    for index, each in enumerate(releases):
        if each not in wanted:
            continue
        start = start or each
        if index == len(releases) - 1:
            parts.append(f"{start}..")
        elif releases[index + 1] not in wanted:
            parts.append(each if start == each else f"{start}..{each}")
            start = None
    return ", ".join(parts)


def unspan(text: str, releases: tuple[str, ...]) -> set[str]:
    """The releases that a text from ``spans`` stands for.

    Raises:
        ValueError: It names a release that is not recorded.
    """
    found: set[str] = set()
    for part in filter(None, text.split(", ")):
        first, dots, last = part.partition("..")
        end = releases.index(last) if last else len(releases) - 1
        found.update(releases[releases.index(first) : end + 1] if dots else [first])
    return found


def of_release(version: str) -> dict[str, str]:
    """The recorded signatures of one release.

    Args:
        version: A recorded release.

    Returns:
        Target to signature; empty when the release was not recorded.
    """
    releases, signatures = recorded()
    return {
        target: signature
        for target, each in signatures.items()
        for signature, text in each.items()
        if version in unspan(text, releases)
    }


def _complaint(target: str, live: str | None) -> str | None:
    releases, signatures = recorded()
    rows = {row.mlx_lm for row in supported()}
    known = {
        signature: text
        for signature, text in signatures.get(target, {}).items()
        if rows & unspan(text, releases)
    }
    if live is None:
        return f"{target} is missing: the installed mlx-lm does not define it"
    if not known:
        return f"{target} was never recorded for a supported mlx-lm"
    if live in known:
        return None
    signature, text = list(known.items())[-1]
    return f"{target} has changed: it is {live}, but was {signature} in mlx-lm {text}"
