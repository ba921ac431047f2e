"""Budgets of a model's weights: bits per weight, a size, or a share of the 16-bit files."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from ..errors import InputError

#: Kinds of budget, as messages name them.
BPW, SIZE, SHARE = "bits per weight", "sizes", "shares of the 16-bit files"
#: Bytes of each unit of a size.
UNITS = {
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}
_UNITS = {unit.lower(): size for unit, size in UNITS.items()}
_FORMS = (
    "a number of bits per weight above 0 and up to 16, such as 4.5, a size such as 8GB or 7.5GiB, "
    "or a share of the 16-bit files such as 70%"
)


@dataclass(frozen=True)
class Budget:
    """What the weights of a model may take.

    Attributes:
        amount: Bits per weight as mlx-lm prints them, bytes of all weight files together with
            their headers, or the share of what these files take in 16 bits, up to 1.
        kind: `BPW`, `SIZE` or `SHARE`.
        text: The budget as the user wrote it; empty if it was not parsed.
    """

    amount: float
    kind: str = BPW
    text: str = ""

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read ``4.5``, ``8GB``, ``7.5GiB`` or ``70%``; units may be in lower case.

        Raises:
            InputError: It is none of these, the unit is unknown, or the amount is 0 or more than
                the original.
        """
        text = text.strip()
        found = re.fullmatch(r"(\d{1,15}(?:\.\d{0,12})?|\.\d{1,12}) ?(%|[A-Za-z]*)", text)
        if found is None:
            raise InputError(f"{text!r} is not {_FORMS}")
        amount, unit = float(found[1]), found[2]
        if unit == "%":
            if amount > 100:
                raise InputError(f"{text!r} is more than the original: give at most 100%")
            budget = cls(amount / 100, SHARE, text)
        elif unit:
            if unit.lower() not in _UNITS:
                raise InputError(
                    f"{text!r} has an unknown unit: give {', '.join(UNITS)}, % of the 16-bit "
                    "files, or bits per weight without a unit"
                )
            budget = cls(math.floor(Fraction(found[1]) * _UNITS[unit.lower()]), SIZE, text)
        else:
            budget = cls(amount, BPW, text)
        if budget.amount <= 0 or (budget.kind == BPW and amount > 16):
            raise InputError(f"{text!r} is not {_FORMS}")
        return budget

    @classmethod
    def parse_list(cls, text: str) -> "tuple[Budget, ...]":
        """Read budgets of one kind with commas between them, each once.

        Raises:
            InputError: One is none, see `parse`, or they are of several kinds.
        """
        budgets = [cls.parse(part) for part in text.split(",")]
        kinds = list(dict.fromkeys(budget.kind for budget in budgets))
        if len(kinds) > 1:
            raise InputError(f"{text!r} mixes {kinds[0]} with {kinds[1]}: give budgets of one kind")
        return tuple({budget.amount: budget for budget in budgets}.values())

    def __str__(self) -> str:
        if self.text or self.kind == BPW:
            return self.text or f"{self.amount:g}"
        return f"{100 * self.amount:g}%" if self.kind == SHARE else f"{self.amount:,.0f} bytes"


def size_text(size: int) -> str:
    """Bytes for a message, in decimal units, rounded up."""
    for unit in ("TB", "GB", "MB", "KB"):
        if size >= UNITS[unit]:
            whole, thousandths = divmod(-(-1000 * size // UNITS[unit]), 1000)
            return f"{whole}.{thousandths:03} {unit}"
    return f"{size} bytes"
