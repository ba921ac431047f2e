"""Rows of the weights table: a JSON-lines file that a stopped run goes on with, and the table."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

COLUMNS = (
    *("budget", "method", "bpw", "KL", "x stock", "accuracy"),
    *("seconds", "processor s", "resident", "MLX"),
)


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


def latest(rows: Iterable[Row]) -> dict[tuple[float, str], Row]:
    """The last row of each budget and label."""
    return {(row["budget"], row["label"]): row for row in rows}


def table(rows: Iterable[Row]) -> str:
    """The rows as Markdown, by budget; a ``*`` behind a time says that others used the machine.

    A method that took more bits than stock is marked as over: it is not at the same bytes.
    """
    known = latest(rows)
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    for budget in sorted({budget for budget, _ in known}, reverse=True):
        stock = known.get((budget, "stock"))
        for row in (row for key, row in known.items() if key[0] == budget):
            lines.append(line(row, stock))
    return "\n".join(lines)


def line(row: Row, stock: Row | None) -> str:
    name = f"| {row['budget']:g} | {row['label']} |"
    cost = row["cost"]
    if cost.get("failure"):
        return f"{name} {cost['failure']} | | | | | | | |"
    ratio = f"{row['kl'] / stock['kl']:.3f}" if stock else ""
    over = " (over)" if stock and row["bpw"] > stock["bpw"] else ""
    accuracy = "" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f} %"
    mlx = "" if cost["mlx_gib"] is None else f"{cost['mlx_gib']:.2f} GiB"
    return (
        f"{name} {row['bpw']:.4f}{over} | {row['kl']:.5f} | {ratio} | {accuracy} | "
        f"{cost['seconds']:.0f}{'*' if row['contended'] else ''} | {cost['processor']:.0f} | "
        f"{cost['resident_gib']:.2f} GiB | {mlx} |"
    )
