"""The quality table: KL by budget and kind of text beside stock's and the best rival's."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from .methods import BUDGETS
from .rows import Row, latest

#: Sizes this near in bits per weight count as the same.
SAME = 0.02

#: Kinds of text as kinds.py names them, in the table's order.
KINDS = ("wikitext", "books", "gsm8k", "python")

EFFORTS = ("plan", "refine", "distill")

Points = list[tuple[float, float]]


def at(points: Points, bits: float) -> float | None:
    """The least KL at a size, on straight lines between sizes and logarithms of KL.

    Args:
        points: Bits per weight and KL of each file.
        bits: The size.

    Returns:
        The KL of a file of this size, or the least on a line from a smaller file to a larger one;
        None where there are none on both sides.
    """
    here = [kl for size, kl in points if abs(size - bits) <= SAME]
    lines = [
        math.exp(
            math.log(low_kl) + (bits - low) / (high - low) * (math.log(high_kl) - math.log(low_kl))
        )
        for low, low_kl in points
        for high, high_kl in points
        if low < bits - SAME and high > bits + SAME
    ]
    return min(here + lines, default=None)


def of_size(points: Points, bits: float) -> float | None:
    """The least KL of the files of a size, or `at` that size where there are none."""
    return min((kl for size, kl in points if abs(size - bits) <= SAME), default=at(points, bits))


@dataclass(frozen=True)
class Compared:
    """One model, budget and kind of text.

    Attributes:
        stock: The KL of stock's file of this size; between its sizes where it has none.
        ours: Effort -> KL.
        dwq: The least KL of dwq's rates at this size.
        ggml: The least of K- and I-quants at this size.
    """

    stock: float | None
    ours: dict[str, float]
    dwq: float | None
    ggml: float | None

    @property
    def best(self) -> float | None:
        """The better rival's KL."""
        return min((kl for kl in (self.dwq, self.ggml) if kl is not None), default=None)


def compared(rows: Iterable[Row], budget: float, kind: str) -> Compared:
    """What the rows of one model say of a budget on a kind of text."""
    found = [row for row in rows if kind in row["kl"]]

    def points(method: str) -> Points:
        return [(row["bpw"], row["kl"][kind]) for row in found if row["method"] == method]

    return Compared(
        of_size(points("stock"), budget),
        {
            row["method"]: row["kl"][kind]
            for row in found
            if row["method"] in EFFORTS and row["budget"] == budget
        },
        at(points("dwq"), budget),
        at(points("ggml"), budget),
    )


def table(rows: Iterable[Row], kinds: Iterable[str] | None = None) -> str:
    """Markdown: a table for each model and number of tokens, a line for each budget and kind.

    Behind a KL stands its share of stock's; an effort's last column is its ratio to the best rival.
    """
    fine = [row for row in latest(rows) if not row["cost"].get("failure")]
    blocks = []
    for model, tokens in dict.fromkeys((row["model"], row["tokens"]) for row in fine):
        mine = [row for row in fine if (row["model"], row["tokens"]) == (model, tokens)]
        named = [kind for kind in KINDS if any(kind in row["kl"] for row in mine)]
        lines = [
            f"{model}, {tokens:,} tokens of each kind:",
            "",
            "| bits per weight | text | stock | `plan` | `refine` | `distill` | `mlx_lm.dwq` "
            "| K- and I-quants | `refine` / best rival | `distill` / best rival |",
            "|---" * 10 + "|",
        ]
        budgets = {row["budget"] for row in mine if row["budget"] is not None}
        for budget in sorted(budgets or BUDGETS, reverse=True):
            for kind in named if kinds is None else kinds:
                lines.append(_line(budget, kind, compared(mine, budget, kind)))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _line(budget: float, kind: str, found: Compared) -> str:
    def share(kl: float | None) -> str:
        if kl is None or found.stock is None:
            return "" if kl is None else f"{kl:.3f}"
        return f"{kl:.3f} ({kl / found.stock:.2f})"

    def ratio(kl: float | None) -> str:
        return "" if kl is None or found.best is None else f"{kl / found.best:.2f}"

    stock = "" if found.stock is None else f"{found.stock:.3f}"
    cells = [f"{budget:g}", kind, stock, *(share(found.ours.get(effort)) for effort in EFFORTS)]
    cells += [share(found.dwq), share(found.ggml)]
    cells += [ratio(found.ours.get("refine")), ratio(found.ours.get("distill"))]
    return "| " + " | ".join(cells) + " |"


def placed(page: str, printed: str, names: Iterable[str]) -> str:
    """A page with a table in place of the one between its marks.

    Args:
        page: Markdown with ``<!-- weights table of ... -->`` and ``<!-- end -->``.
        printed: From `table`.
        names: The files of the rows, which the first mark says.
    """
    between = re.compile("<!-- weights table of .*? -->.*?<!-- end -->", flags=re.S)
    marked = f"<!-- weights table of {' '.join(names)} -->\n{printed}\n<!-- end -->"
    found, count = between.subn(lambda _: marked, page, count=1)
    if not count:
        raise SystemExit("the page has no <!-- weights table of ... --> and <!-- end --> behind it")
    return found
