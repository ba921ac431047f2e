"""The loop of distillation: targets, steps, judgements, and the best of them kept."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ....model.layers import quantizable
from ....model.memory import SHARE, memory_limit
from ....planning.parts import Parts
from ...precision import Precision
from ...sensitivity.problem import Problem
from ..refinement import Refined
from .adam import DECAY, SQUARE_DECAY
from .grids import Grid, Parameter
from .sequences import divided, drawn, whole
from .settings import Settings
from .student import States, Student

#: Bytes of the reference's hidden states that are kept between epochs.
KEPT = 1 << 30
#: Steps over which rates rise, at most.
WARM = 20
#: Steps that are timed; the one before them compiles.
TIMED = 2


@dataclass(frozen=True)
class Distilled:
    """What distillation found.

    Attributes:
        refined: What to store for each quantized tensor.
        parameters: Parameter path -> what to store for each unquantized parameter that moved.
        kl_before: KL of what it started from on the sequences that it judges on, nats a token.
        kl: KL of the result there; no more than ``kl_before``.
        steps: Updates that were made.
        seconds: A step took.
    """

    refined: Refined
    parameters: Mapping[str, mx.array] = field(default_factory=dict)
    kl_before: float = math.nan
    kl: float = math.nan
    steps: int = 0
    seconds: float = math.nan


def distill(
    problem: Problem,
    precisions: dict[str, Precision],
    refined: Refined,
    settings: Settings | None = None,
) -> Distilled:
    """Tune what is stored on the calibration sequences until the logits agree best.

    Beside the model, a step holds one byte a weight, the activations of a batch (of one layer, if
    layers are recomputed) and logits of a few tokens. Where codes move, it holds four bytes a
    weight and all gradients in the dtype to compute in.

    Args:
        problem: The problem that was planned; its model is left as it was.
        precisions: The plan's precision of each refined tensor.
        refined: From `refine`.
        settings: How to distill.

    Returns:
        New values of the same shapes and dtypes, or those given where none is better on held-out
        sequences.
    """
    return _Run(problem, precisions, refined, settings or Settings()).run()


class _Run:
    def __init__(
        self,
        problem: Problem,
        precisions: dict[str, Precision],
        refined: Refined,
        settings: Settings,
    ):
        self.problem, self.refined, self.settings = problem, refined, settings
        self.training, self.judged = divided(problem.calibration, settings)
        self.batch = min(settings.rows, len(self.training))
        model = problem.model
        parts = Parts.of(model, self.batch, self.training.shape[1])
        movable, self.states = self._movable(precisions)
        checkpoint = settings.checkpoint
        if checkpoint is None:
            checkpoint = _needs(problem, refined, self.batch * self.training.shape[1])
        on_gpu = mx.default_device() == mx.Device(mx.gpu)
        self.student = Student(parts, movable, checkpoint and parts.plain, fused=on_gpu)
        compiled = settings.compiled
        if compiled is None:
            # CUDA builds the many kernels of a fused model for minutes, and a CPU gains little.
            compiled = mx.metal.is_available() and on_gpu
        compile_: Callable[[Any], Any] = mx.compile if compiled else lambda function: function
        self.body = compile_(parts.body)
        self.step, self.judge = compile_(self.student.step), compile_(self.student.judged)
        self.targets: dict[str, mx.array] = {}
        most = -(-settings.epochs * len(self.training) // self.batch)
        self.total, self.seconds = min(settings.steps, most), math.nan

    def run(self) -> Distilled:
        model, settings = self.problem.model, self.settings
        training = getattr(model, "training", False)
        model.train()  # where a fused kernel has no gradient, mlx-lm trains without it
        try:
            best, before = self.states, self.kl(self.states)
            least, done = before, 0
            for done, states in self.steps():
                if done % settings.judged_every and done != self.total:
                    continue
                kl = self.kl(states)
                if kl < least:
                    best, least = states, kl
        finally:
            model.train(training)
        return self.result(best, before, least, done)

    def steps(self) -> Iterator[tuple[int, States]]:
        """The number of each step done, from 1 on, and where the student stands behind it."""
        settings, states = self.settings, self.states
        moments = self.student.moments(states)
        numbers = drawn(len(self.training), self.batch, settings.seed)
        started = time.perf_counter()
        bar = tqdm(total=self.total, desc="Distilling", disable=not self.problem.progress)
        with bar:
            step, previous = 0, mx.array(0.0)
            while step < self.total:
                tokens, expected = self.batch_of(self.training, next(numbers), "training")
                pace = _pace(step, self.total)
                rates = {
                    "scale": settings.rate,
                    "centre": settings.rate,
                    "codes": settings.codes_rate,
                    "value": settings.parameters_rate,
                }
                states, moments, kl = self.step(
                    states,
                    moments,
                    tokens,
                    expected,
                    mx.random.key(settings.seed + step),
                    {name: mx.array(rate * pace) for name, rate in rates.items()},
                    [mx.array(1 - d ** (step + 1)) for d in (DECAY, SQUARE_DECAY)],
                )
                mx.async_eval(states, moments, kl)
                mx.eval(previous)  # one step ahead of the device, and no more
                previous, step = kl, step + 1
                if step == 1:
                    mx.eval(states, moments)
                    started = time.perf_counter()
                elif step == 1 + TIMED:
                    mx.eval(states, moments)
                    self.announce((time.perf_counter() - started) / TIMED)
                    bar.total = self.total
                bar.update()
                yield step, states

    def announce(self, seconds: float) -> None:
        """Say how long it will take, and make fewer steps if that is too long."""
        self.seconds = seconds
        if self.settings.seconds is not None:
            most = 1 + TIMED + int(self.settings.seconds / seconds)
            self.total = min(self.total, most)
        rest = seconds * (self.total - 1 - TIMED)
        self.problem.say(
            f"[optiq] Distilling: {seconds:.2g} s a step, {self.total} steps, about {rest:.0f} s"
        )

    def kl(self, states: States) -> float:
        """KL of the student on the held-out sequences, in nats a token."""
        found = [
            self.judge(states, *self.batch_of(self.judged, numbers, "judged"))
            for numbers in whole(len(self.judged), self.batch)
        ]
        return float(mx.stack(found).mean())

    def batch_of(self, sequences: np.ndarray, at: np.ndarray, kind: str) -> tuple:
        """Some sequences (batch, length), and what the reference's layers return for them."""
        tokens = mx.array(sequences[at])
        size = sequences.size * self.student.parts.dim * self.problem.dtype.size
        again = kind == "judged" or self.total * self.batch > 2 * len(sequences)
        if size > KEPT or not again:
            return tokens, self.body(tokens)
        if kind not in self.targets:
            found = []
            for numbers in whole(len(sequences), self.batch):
                found.append(self.body(mx.array(sequences[numbers])))
                mx.eval(found[-1])
            rows = mx.concatenate(found).reshape(-1, sequences.shape[1], self.student.parts.dim)
            self.targets[kind] = rows[: len(sequences)]
            mx.eval(self.targets[kind])
        return tokens, self.targets[kind][mx.array(at)].flatten(0, 1)

    def _movable(
        self, precisions: dict[str, Precision]
    ) -> tuple[dict[str, Grid | Parameter], States]:
        """What moves, in the model's order, and where it starts."""
        problem, settings = self.problem, self.settings
        known = {path: m for path, m in quantizable(problem.model) if path in self.refined}
        movable: dict[str, Grid | Parameter] = {}
        states: States = {}
        for path, module in known.items():
            stored = self.refined[path][1].dtype
            grid = Grid(precisions[path], stored, module.weight.dtype, settings.codes_rate > 0)
            start = grid.start(self.refined[path], problem.weights[path], settings.anchor)
            mx.eval(start)
            movable[f"{path}.weight"], states[f"{path}.weight"] = grid, start
        if settings.parameters_rate > 0:
            for path, value in _parameters(problem.model).items():
                if path not in movable:
                    one = Parameter(_stored(problem, value.dtype), value.dtype)
                    movable[path], states[path] = one, one.start(value)
        return movable, states

    def result(self, best: States, before: float, least: float, done: int) -> Distilled:
        """What to store, and what was judged."""
        found = before, least, done, self.seconds
        if best is self.states:
            return Distilled(self.refined, {}, *found)
        refined, parameters = dict(self.refined), {}
        for path, one in self.student.movable.items():
            if isinstance(one, Grid):
                refined[path.removesuffix(".weight")] = made = one.quantized(best[path])
                mx.eval(made)
            else:
                parameters[path] = best[path]["value"].astype(one.stored)
        mx.eval(parameters)
        return Distilled(refined, parameters, *found)


def _parameters(model: Any) -> dict[str, mx.array]:
    """Weights of norms, and biases of any layer."""
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name in ("weight", "bias")
        if isinstance(value := module.get(name), mx.array)
        and value.ndim == 1
        and mx.issubdtype(value.dtype, mx.floating)
    }


def _stored(problem: Problem, dtype: mx.Dtype) -> mx.Dtype:
    """The dtype in the file; on a CPU half types are computed with in float32."""
    stored = next(iter(problem.weights.values())).dtype
    return stored if dtype == problem.dtype else dtype


def _needs(problem: Problem, refined: Refined, tokens: int) -> bool:
    """Whether activations and weights of all layers at once would take too much memory."""
    modules = {path: m for path, m in quantizable(problem.model) if path in refined}
    each = problem.dtype.size
    weights = sum(module.weight.size for module in modules.values())
    # What goes in and what comes out of each linear layer, and about as much between them.
    activations = sum(sum(module.weight.shape[-2:]) for module in modules.values()) * 2 * tokens
    # The model, its gradients, dequantized weights, and places before and after a step.
    return weights * (3 * each + 4) + activations * each > SHARE * memory_limit()


def _pace(step: int, steps: int) -> float:
    """Share of the largest rate at a step, counted from 0."""
    warm = max(1, min(WARM, steps // 10))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
