"""Inputs of a model's linear layers, and their second moments."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...model.taps import Use, tapped
from .metric import Metric

#: Weight of the pooled moment beside an expert's own, as tokens per input.
PRIOR = 0.25


@dataclass(frozen=True)
class Fed:
    """The inputs of one layer.

    Attributes:
        inputs: (..., in), not yet repeated for each expert that a token goes to.
        indices: Expert of each output row (...), for stacked experts; else None.
        lead: Shape of the output rows.
    """

    inputs: mx.array
    indices: mx.array | None
    lead: tuple[int, ...]

    def beside(self, other: "Fed") -> bool:
        """Whether two layers have the same input array, as q, k and v have."""
        return self.inputs is other.inputs and self.indices is other.indices

    def rows(self) -> mx.array:
        """One row per use of a token, (rows, in), in float32."""
        rows = mx.broadcast_to(self.inputs, (*self.lead, self.inputs.shape[-1]))
        return rows.astype(mx.float32).reshape(-1, rows.shape[-1])

    def experts(self) -> mx.array:
        """Expert of each row, (rows,)."""
        assert self.indices is not None
        return mx.broadcast_to(self.indices[..., None], self.lead).reshape(-1)


@dataclass(frozen=True)
class Moments:
    """Sums over rows.

    Attributes:
        own: Of ``x x^T``, (in, in); of each expert's rows, (experts, in, in), for stacked experts.
        cross: Of the reference's inputs with these, (in, in); None for stacked experts, whose rows
            differ where the two route differently.
        uses: Number of each expert's rows, (experts,); stacked experts only.
    """

    own: mx.array
    cross: mx.array | None = None
    uses: mx.array | None = None

    @classmethod
    def of(cls, fed: Fed, experts: int, reference: Fed | None = None) -> "Moments":
        """Moments of one batch; ``experts`` counts only where there are indices."""
        rows = fed.rows()
        if fed.indices is not None:
            return cls._by_expert(rows, fed.experts(), experts)
        cross = None if reference is None else reference.rows().T @ rows
        return cls(rows.T @ rows, cross)

    @classmethod
    def _by_expert(cls, rows: mx.array, expert: mx.array, experts: int) -> "Moments":
        rows = rows[mx.argsort(expert)]
        uses = np.bincount(np.array(expert), minlength=experts)
        ends = np.cumsum(uses)
        parts = [rows[int(end - n) : int(end)] for end, n in zip(ends, uses, strict=True)]
        return cls(mx.stack([part.T @ part for part in parts]), uses=mx.array(uses))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.own + other.own,
            None if self.cross is None or other.cross is None else self.cross + other.cross,
            None if self.uses is None or other.uses is None else self.uses + other.uses,
        )

    def arrays(self) -> list[mx.array]:
        """All arrays, for evaluation."""
        return [part for part in (self.own, self.cross, self.uses) if part is not None]

    @property
    def metric(self) -> Metric:
        """What rounding measures errors with.

        Each expert's moment has the pooled one beside it: an expert that saw few tokens takes most
        of it from the others, one that saw none all.
        """
        if self.uses is None:
            return Metric(self.own, self.cross)
        pooled = self.own.sum(axis=0) / mx.maximum(self.uses.sum(), 1)
        return Metric(self.own + PRIOR * self.own.shape[-1] * pooled)


def inputs(
    modules: Mapping[str, nn.Module], run: Callable[[], mx.array], *, evaluate: bool = True
) -> dict[str, Fed]:
    """Inputs of plain linear layers and stacked experts during a run, in order of use.

    Look-ups, and stacks that take no expert indices (one matrix per head), are left out.
    """
    seen: dict[str, Fed] = {}

    def see(use: Use) -> mx.array:
        stacked = modules[use.path]["weight"].ndim == 3
        if not use.lookup and stacked == (use.indices is not None):
            seen.setdefault(use.path, Fed(use.inputs, use.indices, use.outputs.shape[:-1]))
        return use.outputs

    with tapped(modules, see):
        output = run()
    if evaluate:
        mx.eval(output, [(fed.inputs, fed.indices) for fed in seen.values()])
    return seen


def stages(seen: Mapping[str, Fed]) -> list[list[str]]:
    """Groups of layers with the same input array, in the order they run."""
    groups: list[tuple[Fed, list[str]]] = []
    for path, fed in seen.items():
        for first, paths in groups:
            if fed.beside(first):
                paths.append(path)
                break
        else:
            groups.append((fed, [path]))
    return [paths for _, paths in groups]
