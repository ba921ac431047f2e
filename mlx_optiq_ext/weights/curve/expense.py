"""What a conversion by plan will take: seconds and memory, from work that is measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ...model.layers import layer_index
from ..judgement import Precisions
from ..precision import quantize
from ..rounding.refinement import refine
from ..sensitivity.problem import Findings, Problem
from ..sensitivity.taylor import differentiated


@dataclass(frozen=True)
class Expense:
    """Time and memory of a conversion.

    Attributes:
        planned: Seconds that planning took here; a conversion reads what was measured.
        further: Expected seconds of rounding and judging.
        memory: Expected peak of MLX's memory in bytes.
    """

    planned: float
    further: float
    memory: int


def expense(problem: Problem, precisions: Precisions, planned: float, judging: float) -> Expense:
    """Round the tensors of one decoder layer, and take the others to need the same for a weight.

    With refinement the backward pass for it is measured too.

    Args:
        problem: The problem that was planned.
        precisions: The plan.
        planned: Seconds that planning took.
        judging: Seconds of judging one plan.
    """
    index = layer_index(problem.model)
    quantized = {path: p for path, p in precisions.items() if p.quantized}
    inside = {path: p for path, p in quantized.items() if index.get(path) == 0} or quantized
    elements = {t.path: t.size for t in problem.tensors}
    times = sum(elements[path] for path in quantized) / max(1, sum(elements[p] for p in inside))
    further, kept = judging, 0
    if problem.refine:
        own = replace(problem, findings=Findings(), progress=False, say=lambda line: None)
        own.findings.parts = problem.findings.parts
        further += _seconds(lambda: differentiated(own))
        if mx.default_device() != mx.Device(mx.cpu):
            refine(own, inside)  # compiles kernels, once for all layers
        least = min(inside, key=lambda path: elements[path])
        passes = _seconds(lambda: refine(own, {least: inside[least]}))
        layer = _seconds(lambda: refine(own, inside))
        further += judging + passes + max(0.0, layer - passes) * times
        if problem.stream is None:  # otherwise what is refined waits on disk
            kept = sum(t.stored_bits(precisions[t.path]) for t in problem.tensors) // 8
    else:
        further += times * _seconds(
            lambda: [mx.eval(quantize(problem.weights[path], p)) for path, p in inside.items()]
        )
    return Expense(planned, further, mx.get_peak_memory() + kept)


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
