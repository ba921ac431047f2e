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


HEADER = (
    "| budget | file | bits per weight | bytes | KL | seconds | resident | MLX |\n"
    "|---|---|---|---|---|---|---|---|"
)


def line(row: Row) -> str:
    """One row of Markdown below ``HEADER``: sizes, KL by kind, time and memory.

    A ``*`` behind a time says that others used the machine.
    """
    cost, budget = row["cost"], "" if row["budget"] is None else f"{row['budget']:g}"
    name = f"| {budget} | {row['label']} |"
    if cost.get("failure"):
        return f"{name} {cost['failure']} | | | | | |"
    size = "" if row["bytes"] is None else f"{row['bytes']:,}"
    kl = ", ".join(f"{kind} {value:.4f}" for kind, value in sorted(row["kl"].items()))
    resident, mlx = (
        "" if cost[kind] is None else f"{cost[kind]:.2f} GiB"
        for kind in ("resident_gib", "mlx_gib")
    )
    seconds = f"{cost['seconds']:.0f}{'*' if row['contended'] else ''}"
    return f"{name} {row['bpw']:.4f} | {size} | {kl} | {seconds} | {resident} | {mlx} |"
