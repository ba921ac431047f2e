"""The rows and features of ``matrix.toml``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from .version import release

Kind = Literal["pinned", "untested", "outside"]

_FILE = Path(__file__).with_name("matrix.toml")


@dataclass(frozen=True)
class Row:
    """One mlx-lm release.

    Attributes:
        mlx_lm: The release, for example ``"0.32.2"``.
        verdict: Whether we run on it.
        mlx: The range of mlx it works with.
        transformers: The range of transformers it works with.
        tested_mlx: The mlx that ``compat/constraints`` pins for it.
        tested_transformers: The transformers pinned for it.
        ci: Whether its tests run on every push.
        beyond: What happens with an mlx that is newer than the range; empty if unknown.
    """

    mlx_lm: str
    verdict: Kind
    mlx: str
    transformers: str
    tested_mlx: str
    tested_transformers: str
    ci: bool
    beyond: str = ""


@dataclass(frozen=True)
class Feature:
    """One feature and the release it starts at.

    Attributes:
        name: The key, for example ``"kv_batched"``.
        title: The heading of its column in the table.
        since: The first mlx-lm release it works on.
        lacks: What older releases lack; empty when the feature is on in every row.
        below: What happens on older releases instead; empty when the feature is on in every row.
        planned: Whether it is known to fit but not built yet.
    """

    name: str
    title: str
    since: str
    lacks: str = ""
    below: str = ""
    planned: bool = False


@cache
def _data() -> dict[str, Any]:
    import tomllib

    with _FILE.open("rb") as file:
        return tomllib.load(file)


@cache
def rows() -> tuple[Row, ...]:
    """Every release of the matrix, oldest first, including those outside."""
    return tuple(
        Row(
            mlx_lm=row["mlx_lm"],
            verdict=row["verdict"],
            mlx=row["mlx"],
            transformers=row["transformers"],
            tested_mlx=row["tested_with"]["mlx"],
            tested_transformers=row["tested_with"]["transformers"],
            ci=row.get("ci", False),
            beyond=row.get("beyond", ""),
        )
        for row in _data()["row"]
    )


@cache
def supported() -> tuple[Row, ...]:
    """The rows that are not outside, oldest first."""
    return tuple(row for row in rows() if row.verdict != "outside")


@cache
def features() -> tuple[Feature, ...]:
    """Every feature of the matrix, planned ones included, in the order of the table's columns."""
    return tuple(Feature(name=name, **fields) for name, fields in _data()["features"].items())


def markdown_table() -> str:
    """The matrix as a Markdown table: one line a release, newest first.

    Returns:
        The table without a trailing newline.
    """
    built = [each for each in features() if not each.planned]
    head = ["mlx-lm", "verdict", "mlx", "transformers", *(each.title for each in built)]
    lines = [head, ["---"] * len(head)]
    for row in reversed(rows()):
        cells = [_cell(row, each) for each in built]
        lines.append([row.mlx_lm, row.verdict, row.mlx, row.transformers, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: Row, feature: Feature) -> str:
    if row.verdict == "outside":
        return "no"
    return "yes" if release(row.mlx_lm) >= release(feature.since) else feature.below
