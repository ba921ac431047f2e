"""What rounding is made of, wherever it computes: arrays, products, and passes over columns."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from .grid import Format, Rounded
from .metric import Ordered


class Steps(Protocol):
    """Arrays (batch, rows, columns) in float32, and what rounding does to a group of columns."""

    @property
    def beside(self) -> bool:
        """Whether the processor is free while these compute."""
        ...

    def array(self, values: Any) -> Any:
        """Values in float32."""
        ...

    def product(self, left: Any, right: Any) -> Any:
        """``left @ right``, exact enough to take differences of."""
        ...

    def concatenate(self, parts: Sequence[Any], axis: int = -1) -> Any:
        """Parts side by side."""
        ...

    def take(self, values: Any, at: np.ndarray, axis: int) -> Any:
        """Elements along an axis; ``at`` is (count,), or (batch, count) for the last axis."""
        ...

    def choose(self, condition: Any, new: Any, old: Any) -> Any:
        """One array where a condition holds, else another."""
        ...

    def start(self, *arrays: Any) -> None:
        """Begin to compute."""
        ...

    def feedback(self, target: Any, found: Ordered, form: Format) -> Rounded:
        """Round rows column by column, each moved by the errors of those before it.

        Args:
            target: What to round, (batch, rows, in), in the order of rounding.
            found: The inputs' moments for this group size.
            form: Bits, group size and storage dtype.
        """
        ...

    def sweep(self, done: Rounded, slope: Any, found: Ordered, form: Format) -> tuple[Rounded, Any]:
        """One pass of coordinate descent over all groups of each row.

        Of each group, scales and biases are refitted, then its columns are rounded again.

        Args:
            done: Where to start; left as it was.
            slope: Error times moment, (batch, rows, in).
            found: The inputs' moments for this group size.
            form: Bits, group size and storage dtype.

        Returns:
            The rows anew, and the change of their error.
        """
        ...
