"""What rounding is made of, wherever it computes: arrays, products, and a group of columns."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from .grid import Format, Group


class Steps(Protocol):
    """Arrays (batch, rows, columns) in float32, and what rounding does to a group of columns."""

    def array(self, values: Any) -> Any:
        """Values in float32."""
        ...

    def factor(self, values: Any) -> Any:
        """What a product takes as its right factor; it can be sliced."""
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

    def feedback(
        self, weight: Any, shift: Any | None, share: Any, coupling: Any, form: Format
    ) -> tuple[Group, Any]:
        """Round one group column by column, each moved by the errors of those before it.

        Args:
            weight: What to round, (batch, rows, group size).
            shift: By how much the errors of earlier groups move it; None for nothing.
            share: Weight of each column's squared error in the search for scales, of sum 1, (batch,
                group size).
            coupling: By how much what is rounded away of a column moves each later one, (batch,
                group size, group size), strictly upper triangular.
            form: Bits, group size and storage dtype.

        Returns:
            The group, and ``weight`` minus what it stands for.
        """
        ...

    def sweep(self, slope: Any, group: Group, moment: Any, form: Format) -> tuple[Group, Any]:
        """Coordinate descent in one group: refit its scales and biases, then round it again.

        Args:
            slope: Error times moment, (batch, rows, group size), with what earlier groups changed.
            group: As it is.
            moment: Of the group's inputs, (batch, group size, group size).
            form: Bits, group size and storage dtype.

        Returns:
            The group anew, and the change of the error (target minus weight).
        """
        ...
