"""Inputs of a model's linear layers, and their second moments."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...model.replay import Call
from ...model.taps import Use, tapped
from .metric import Metric

#: Weight of the pooled moment beside an expert's own, as tokens per input.
PRIOR = 0.25
#: Bytes of the inputs of a decoder layer's modules that are held.
HELD = 1 << 29
#: Bytes of experts' moments that are held at once, and least parts of a stack of many experts.
EXPERT_BYTES, PARTS = 1 << 30, 8

#: Runs a decoder layer on a call's arguments and a hidden state.
Run = Callable[[Call, mx.array], mx.array]


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
        own: Of ``x x^T``, (in, in).
        cross: Of the reference's inputs with these, (in, in); None without a reference.
    """

    own: mx.array
    cross: mx.array | None = None

    @classmethod
    def of(cls, fed: Fed, reference: Fed | None = None) -> "Moments":
        """Moments of one batch."""
        rows = fed.rows()
        return cls(rows.T @ rows, None if reference is None else reference.rows().T @ rows)

    def __add__(self, other: "Moments") -> "Moments":
        if self.cross is None or other.cross is None:
            return Moments(self.own + other.own)
        return Moments(self.own + other.own, self.cross + other.cross)

    def arrays(self) -> list[mx.array]:
        """All arrays, for evaluation."""
        return [part for part in (self.own, self.cross) if part is not None]


def expert_parts(experts: int, size: int, limit: int = EXPERT_BYTES) -> list[slice]:
    """A stack's experts, a few at a time.

    Args:
        experts: How many the stack has.
        size: Inputs of one.
        limit: Bytes of the moments of two parts together; one expert's are held anyway.
    """
    step = max(1, min(limit // (8 * size * size), -(-experts // PARTS)))
    return [slice(i, min(i + step, experts)) for i in range(0, experts, step)]


def expert_metrics(
    feds: list[Fed], experts: int, parts: Sequence[slice]
) -> Iterator[tuple[slice, Metric]]:
    """What some experts of a stack are rounded with, one part of the stack after the other.

    Each expert's moment has the pooled one beside it: an expert that saw few tokens takes most of
    it from the others, one that saw none all.

    Args:
        feds: What the stack was fed, a batch each.
        experts: How many it has.
        parts: From `expert_parts`.

    Yields:
        Each part, and a metric whose moments are (some, in, in).
    """
    size = feds[0].inputs.shape[-1]
    pooled, uses, places = mx.zeros((size, size)), 0, []
    for fed in feds:
        rows, expert = fed.rows(), np.array(fed.experts())
        pooled, uses = pooled + rows.T @ rows, uses + len(expert)
        mx.eval(pooled)
        order = np.argsort(expert, kind="stable")
        ends = np.searchsorted(expert[order], np.arange(1, experts))
        places.append([mx.array(part) for part in np.split(order, ends)])
    prior = PRIOR * size * pooled / max(uses, 1)
    for at in parts:
        moments = [prior] * (at.stop - at.start)
        for fed, of_expert in zip(feds, places, strict=True):
            rows = fed.rows()
            for number, own in enumerate(of_expert[at]):
                if own.size:
                    used = rows[own]
                    moments[number] = moments[number] + used.T @ used
            mx.eval(moments)
        metric = Metric(mx.stack(moments))
        mx.eval(metric.moment)
        moments.clear()
        yield at, metric


def inputs(
    modules: Mapping[str, nn.Module], run: Callable[[], mx.array], *, evaluate: bool = True
) -> tuple[dict[str, Fed], mx.array]:
    """Inputs of plain linear layers and stacked experts during a run, in order of use.

    Also returns what the run does.

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
    return seen, output


class ReferenceInputs:
    """The inputs of a layer's modules before any of them is rounded, batch by batch.

    Attributes:
        outputs: What the layer returns, a batch each.
        stages: Paths of layers with the same input array, in the order they run.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], calls: list[Call], run: Run, held: int = HELD
    ):
        """Run the layer on all batches.

        Args:
            modules: Layer path -> linear layer inside of this decoder layer.
            calls: Of the decoder layer.
            run: Runs it on a call's arguments and a hidden state.
            held: Bytes of inputs that are kept; more are computed again when they are asked for.
        """
        self._modules, self._calls, self._run = modules, calls, run
        self._weights = {path: module["weight"] for path, module in modules.items()}
        self._kept: list[dict[str, Fed]] = []
        self.outputs: list[mx.array] = []
        self.stages: list[list[str]] = []
        keeps = True
        for call in calls:
            seen, output = inputs(modules, partial(run, call, call.hidden), evaluate=False)
            mx.eval(output)
            self.outputs.append(output)
            self.stages = self.stages or stages(seen)
            if len(self.outputs) == 1:  # the largest batch decides for all
                keeps = len(calls) * sum(fed.inputs.nbytes for fed in seen.values()) <= held
            if keeps:
                mx.eval([(fed.inputs, fed.indices) for fed in seen.values()])
                self._kept.append(seen)

    def fed(self, number: int, path: str) -> Fed:
        """What a module was fed in a batch; computed once more where there is too much to keep."""
        if self._kept:
            return self._kept[number][path]
        call, rounded = self._calls[number], {p: m["weight"] for p, m in self._modules.items()}
        try:
            self._put(self._weights)
            own = {path: self._modules[path]}
            return inputs(own, partial(self._run, call, call.hidden), evaluate=False)[0][path]
        finally:
            self._put(rounded)

    def _put(self, weights: Mapping[str, mx.array]) -> None:
        for path, weight in weights.items():
            self._modules[path]["weight"] = weight


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
