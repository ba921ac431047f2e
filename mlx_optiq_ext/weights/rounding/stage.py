"""Weights with the same inputs, which the processes of ``mlx.launch`` round together.

Weights whose rows do not depend on each other, and stacks of experts, are cut into pieces. The cuts
do not depend on the number of processes, and so neither do the results.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx
import numpy as np

from ... import distributed
from ..precision import Precision
from . import threads
from .feedback import BLOCKS, SWEEPS, OutputSide, Quantized, round_weight
from .inputs import PARTS, Fed, expert_metrics, expert_parts
from .metric import Metric
from .steps import Steps

T = TypeVar("T")

#: Least rows of a piece.
ROWS = 1024


@dataclass(frozen=True)
class Thoroughness:
    """What refinement spends its time on.

    Attributes:
        blocks: Blocks of rows of a weight at most, where its outputs' gradients are known.
        sweeps: Passes of coordinate descent.
        outputs: Whether errors are weighed with the outputs' gradients; otherwise all rows are
            rounded at once, and ``blocks`` has no effect.
        exact: Whether products on a GPU keep 19 bits of their factors rather than its 11 (TF32).
    """

    blocks: int = BLOCKS
    sweeps: int = SWEEPS
    outputs: bool = True
    exact: bool = True


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded.

    Attributes:
        plan: Tensor path -> its precision.
        steps: Where to compute.
        thoroughness: What to spend time on.
    """

    plan: Mapping[str, Precision]
    steps: Steps
    thoroughness: Thoroughness

    def rounded(
        self,
        path: str,
        weight: mx.array,
        metric: Metric,
        outputs: OutputSide | None = None,
        share: float = 0.0,
    ) -> Quantized:
        """Some rows of a weight, or some experts of a stack, rounded."""
        return round_weight(
            weight, metric, self.plan[path], weight.dtype, outputs=outputs, share=share,
            sweeps=self.thoroughness.sweeps, steps=self.steps,
        )  # fmt: skip

    def sizes(self, paths: Sequence[str]) -> list[int]:
        """Group sizes of some weights, each once."""
        return list(dict.fromkeys(self.plan[path].group_size for path in paths))


class Stage:
    """Linear layers that are fed the same, of which this process rounds a share.

    The outputs' side depends on no input. Where the device works beside the processor it is
    prepared from the beginning, while the device computes the inputs.
    """

    def __init__(
        self,
        rounding: Rounding,
        weights: Mapping[str, mx.array],
        across: Mapping[str, mx.array | None],
    ):
        """Divide the weights.

        Args:
            rounding: How they are rounded.
            weights: Tensor path -> weight (out, in) in the dtype it is stored in.
            across: Second moments of the gradients at their outputs, (out, out), where known.
        """
        self._rounding, self._weights, self._across = rounding, weights, {}
        if rounding.thoroughness.outputs:
            self._across = {path: a for path, a in across.items() if a is not None}
        self._pieces = [(path, rows) for path in weights for rows in self._cut(path)]
        self._whose = distributed.owners(
            [(rows.stop - rows.start) * weights[path].shape[1] for path, rows in self._pieces]
        )
        self._own = _own(self._pieces, self._whose)
        self._sides = self._begun() if rounding.steps.beside else {}

    def rounded(self, metric: Metric, share: float = 0.0) -> dict[str, Quantized]:
        """All weights rounded against their inputs, and their outputs where those are known.

        Args:
            metric: Of the inputs.
            share: How far the targets make up for the error of earlier layers, from 0 to 1.
        """
        rounding = self._rounding
        with threads.single():
            self._sides = self._sides or self._begun()
            for size in rounding.sizes([path for path, _ in self._own]):
                metric.begin(size)
            found = []
            for path, rows in self._own:
                side = self._sides[path].result() if path in self._sides else None
                weight = self._weights[path][rows]
                found.append(rounding.rounded(path, weight, metric, side, share))
        parts: dict[str, list[Quantized]] = {}
        every = distributed.collected(found, self._whose)
        for (path, _), part in zip(self._pieces, every, strict=True):
            parts.setdefault(path, []).append(part)
        return {path: _joined(own) for path, own in parts.items()}

    def _cut(self, path: str) -> list[slice]:
        rows = self._weights[path].shape[0]
        count = 1 if path in self._across else max(1, min(PARTS, rows // ROWS))
        step = -(-rows // count)
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def _begun(self) -> dict[str, Future[OutputSide]]:
        """The outputs' side of this process's weights."""
        blocks = self._rounding.thoroughness.blocks
        return {
            path: threads.begun(
                OutputSide.of, np.array(self._across[path].astype(mx.float32)), blocks
            )
            for path, _ in self._own
            if path in self._across
        }


def experts(
    rounding: Rounding, weights: Mapping[str, mx.array], feds: list[Fed]
) -> dict[str, Quantized]:
    """Stacks that are fed the same, each expert rounded by the tokens that are routed to it.

    Args:
        rounding: How they are rounded.
        weights: Tensor path -> stack (experts, out, in) in the dtype it is stored in.
        feds: What they are fed, a batch each.
    """
    count = len(next(iter(weights.values())))
    parts = expert_parts(count, feds[0].inputs.shape[-1])
    whose = distributed.owners([part.stop - part.start for part in parts])
    metrics = expert_metrics(feds, count, _own(parts, whose))
    if rounding.steps.beside:
        metrics = _ahead(metrics, rounding.sizes(list(weights)))
    own: list[list[Quantized]] = []
    for at, metric in metrics:
        with threads.single():
            own.append([rounding.rounded(path, w[at], metric) for path, w in weights.items()])
    found = distributed.collected(own, whose)
    return {
        path: _joined(list(same))
        for path, same in zip(weights, zip(*found, strict=True), strict=True)
    }


def _ahead(
    metrics: Iterator[tuple[slice, Metric]], sizes: Sequence[int]
) -> Iterator[tuple[slice, Metric]]:
    """Each part while the moments of the next one are factored already."""
    waiting: tuple[slice, Metric] | None = None
    for at, metric in metrics:
        for size in sizes:
            metric.begin(size)
        if waiting is not None:
            yield waiting
        waiting = at, metric
    if waiting is not None:
        yield waiting


def _own(items: Sequence[T], whose: Sequence[int]) -> list[T]:
    rank = distributed.rank()
    return [item for item, owner in zip(items, whose, strict=True) if owner == rank]


def _joined(parts: Sequence[Quantized]) -> Quantized:
    if len(parts) == 1:
        return tuple(parts[0])
    return tuple(mx.concatenate(list(same)) for same in zip(*parts, strict=True))
