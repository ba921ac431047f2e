"""Rows of the weights table: a JSON-lines file that a stopped run goes on with."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Rows so far; the last line of a stopped run may be cut off."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def append(path: Path, row: Row) -> None:
    """Add a row, on a line of its own even behind one that was cut off."""
    with path.open("a") as stream:
        stream.write("\n" + json.dumps(row) + "\n")


def key(row: Row) -> tuple[str, int, float | None, str]:
    """What tells a row from others.

    A rival's file is the same for every budget that it lies near; ours is made for one.
    """
    return row["model"], row["tokens"], row["budget"], row["label"]


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each model, tokens, budget and label."""
    return list({key(row): row for row in rows if "label" in row}.values())


def line(row: Row) -> str:
    """One row of Markdown: sizes, KL by kind, time and memory.

    A ``*`` behind a time says that others used the machine.
    """
    cost, budget = row["cost"], "" if row["budget"] is None else f"{row['budget']:g}"
    name = f"| {budget} | {row['label']} |"
    if cost.get("failure"):
        return f"{name} {cost['failure']} | | | | | |"
    kl = ", ".join(f"{kind} {value:.4f}" for kind, value in sorted(row["kl"].items()))
    mlx = "" if cost["mlx_gib"] is None else f"{cost['mlx_gib']:.2f} GiB"
    return (
        f"{name} {row['bpw']:.4f} | {row['bytes']:,} | {kl} | "
        f"{cost['seconds']:.0f}{'*' if row['contended'] else ''} | "
        f"{cost['resident_gib']:.2f} GiB | {mlx} |"
    )
