"""Refinement of a plan: GPTQ-style rounding, each layer after the quantized layers before it.

Every tensor keeps the plan's bits and group size, so the result is a plain MLX model. Decoder
layers are rounded in order. Each tensor's second moment comes from its actual inputs, after the
layers that are quantized already; its target moves towards the reference's output on the
reference's inputs (GPTAQ, Li et al., arXiv 2504.02692, here in closed form). Stacked experts are
rounded one by one, each against the tokens that the quantized model routes to it.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from ... import distributed
from ...model.layers import decoder_layers, layer_index, quantizable
from ...model.layerwise import entry, outlines, recordings
from ...model.replay import Call, Recording, chained, finish
from ...model.spill import SpilledPacked
from ...planning.divergence import Reference
from ..precision import Precision, assembled, dequantize, quantize
from ..sensitivity.moments import Factors
from ..sensitivity.problem import Problem, batches, layer_batches
from ..sensitivity.taylor import differentiated
from . import threads
from .feedback import Quantized
from .inputs import Moments, ReferenceInputs, inputs
from .metric import Metric
from .selection import current
from .stage import Rounding, Stage, Thoroughness, experts

#: How far targets compensate the error of earlier layers, from 0 to 1.
SHARE = 0.5

#: Tensor path -> (words, scales, biases).
Refined = Mapping[str, Quantized]


def refine(
    problem: Problem,
    precisions: dict[str, Precision],
    thoroughness: Thoroughness | None = None,
) -> Refined:
    """Round every planned tensor anew.

    The processes of ``mlx.launch`` run the same forward passes and round a share of the tensors
    each. All get every result, which is that of one process.

    Args:
        problem: The problem that was planned; its model is left as it was.
        precisions: The plan's precision of each tensor.
        thoroughness: What to spend time on.

    Returns:
        The values to store for each quantized tensor. Models whose layers pass on more than a
        hidden state, and stacks of one matrix per head, are rounded by MLX.
    """
    refiner = _Refiner(problem, precisions, thoroughness or Thoroughness())
    index = layer_index(problem.model)
    outer = [path for path in refiner.modules if path not in index]
    beside = refiner.rounding.steps.beside
    with refiner.originals(outer), threads.single() if beside else nullcontext():
        refiner.run()
    return refiner.result


def judge(problem: Problem, precisions: dict[str, Precision], refined: Refined) -> float:
    """KL(reference || refined) on the held-out sequences, in nats per token.

    The processes of ``mlx.launch`` run some of the sequences each.
    """
    parts, dtype, own = problem.parts, problem.dtype, {}
    every = batches(problem.calibration.held_out)
    references = [
        (number, tokens, Reference.run(parts, tokens))
        for number, tokens in distributed.share(list(enumerate(every)))
    ]
    with problem.replaced(refined, lambda p: restored(refined[p], precisions[p], dtype)):
        for number, tokens, reference in references:
            own[number] = float(reference.compared(parts, tokens).sum())
    found = {number: kl for part in distributed.gathered(own) for number, kl in part.items()}
    return sum(found[number] for number in range(len(every))) / problem.calibration.held_out.size


def restored(quantized: Quantized, precision: Precision, dtype: mx.Dtype) -> mx.array:
    """The weight (..., out, in) of some words, scales and biases, computed in ``dtype``."""
    *rows, groups = quantized[1].shape
    return assembled(
        (*rows, groups * precision.group_size),
        dtype,
        lambda at: dequantize(tuple(part[at] for part in quantized), precision, dtype),
    )


class _Refiner:
    def __init__(
        self, problem: Problem, precisions: dict[str, Precision], thoroughness: Thoroughness
    ):
        self.problem = problem
        self.modules = dict(quantizable(problem.model))
        self.plan = {path: p for path, p in precisions.items() if p.quantized}
        self.result: dict[str, Quantized] | SpilledPacked = {}
        if problem.stream is not None:
            self.result = SpilledPacked(problem.stream.spill)
        self.block: dict[str, Quantized] = {}
        steps = current(problem.note, exact=thoroughness.exact)
        self.rounding = Rounding(self.plan, steps, thoroughness)
        self.factors: Mapping[str, Factors] = {}

    def run(self) -> None:
        model, data = self.problem.model, layer_batches(self.problem.calibration.refining)
        layers = decoder_layers(model)
        inside = {id(m): i for i, layer in enumerate(layers) for m in layer.modules()}
        own: list[list[str]] = [[] for _ in layers]
        outer = []
        for path in self.plan:
            index = inside.get(id(self.modules[path]))
            (outer if index is None else own[index]).append(path)
        recorded = None if self.problem.stream else outlines(model, data)
        if recorded is None:
            spill = self.problem.spill(self.problem.calibration.refining.size)
            recorded = recordings(model, data, self.problem.stream, spill)
        if not layers or not all(chained(r) for r in recorded):
            self.problem.note(
                "The layers of this model pass on more than a hidden state: not refined, but "
                "rounded by MLX"
            )
            for paths in (outer, *own):
                plain = {path: self.plain(path) for path in paths}
                mx.eval(plain)
                self.result.update(plain)
            return
        before = [r[0].hidden for r in recorded]
        mx.eval(before)
        found = self.factors = differentiated(self.problem)
        lookups = [path for path in outer if found[path].columns is not None]
        for path in lookups:
            self.embedding(path, found[path])
        self.flush()
        # With a rounded embedding, the first layer has other inputs than the reference's.
        hidden = [entry(model, tokens) for tokens in data] if lookups else before
        mx.eval(hidden)
        spent, started = [], time.perf_counter()
        for index in tqdm(range(len(layers)), desc="Refining", disable=not self.problem.progress):
            if index in (1, 2):
                spent.append(time.perf_counter() - started)
                self.announce(spent, len(layers))
            started = time.perf_counter()
            calls = [r[index].entered(h) for r, h in zip(recorded, before, strict=True)]
            with self.problem.layer(index), self.originals(own[index]):
                before, hidden = self.layer(layers[index], own[index], calls, hidden)
            self.flush()
        rest = [path for path in outer if path not in lookups]
        self.head(rest, data, recorded, hidden)
        self.flush()

    def announce(self, seconds: list[float], layers: int) -> None:
        """Say how long it will take, by the first layer; by the second if the first compiled."""
        done, own = len(seconds), seconds[-1]
        if done == 1 or 2 * own < seconds[0]:
            which = ("first", "second")[done - 1]
            self.problem.say(
                f"[optiq] Refining: {own:.2g} s for the {which} of {layers} layers, about "
                f"{own * (layers - done):.0f} s for the others"
            )

    @contextmanager
    def originals(self, paths: list[str]) -> Iterator[None]:
        """Restore the weights of some tensors afterwards."""
        kept = {path: self.modules[path].weight for path in paths}
        try:
            yield
        finally:
            for path, weight in kept.items():
                self.modules[path].weight = weight

    def store(self, path: str, quantized: Quantized) -> None:
        """Keep a tensor's result and put its dequantized weight into the model."""
        weight = restored(quantized, self.plan[path], self.problem.dtype)
        mx.eval(quantized, weight)
        self.block[path], self.modules[path].weight = quantized, weight

    def keep(self, found: Mapping[str, Quantized]) -> None:
        """Store some results."""
        for path, quantized in found.items():
            self.store(path, quantized)

    def flush(self) -> None:
        """Return the kept results."""
        self.result.update(self.block)
        self.block = {}

    def plain(self, path: str) -> Quantized:
        """MLX's own rounding."""
        return quantize(self.problem.weights[path], self.plan[path])

    def stage(self, paths: list[str]) -> Stage:
        """Tensors that are fed the same."""
        weights = {path: self.problem.weights[path] for path in paths}
        return Stage(self.rounding, weights, {path: self.factors[path].across for path in paths})

    def embedding(self, path: str, found: Factors) -> None:
        """Round an embedding, which may also be the head."""
        moment = found.moment
        assert moment is not None
        self.keep(self.stage([path]).rounded(Metric(moment)))

    def layer(
        self, layer: nn.Module, paths: list[str], calls: list[Call], hidden: list[mx.array]
    ) -> tuple[list[mx.array], list[mx.array]]:
        """Refine one decoder layer; returns the hidden states after it, the reference's first."""
        modules = {path: self.modules[path] for path in paths}

        def run(call: Call, state: mx.array) -> mx.array:
            output = layer(state, *call.args[1:], **call.kwargs)
            return output[0] if isinstance(output, tuple) else output

        reference = ReferenceInputs(modules, calls, run)
        groups = reference.stages
        for path in set(paths) - {path for group in groups for path in group}:
            self.store(path, self.plain(path))
        for group in groups:
            if self.modules[group[0]].weight.ndim == 3:
                self.experts(group, calls, hidden, run)
                continue
            stage = self.stage(group)
            moments = self.moments(group[0], reference, calls, hidden, run)
            self.keep(stage.rounded(Metric(moments.own, moments.cross), SHARE))
            del moments  # before the next stage's
        result = []
        for call, state in zip(calls, hidden, strict=True):
            result.append(run(call, state))
            mx.eval(result[-1])
        return reference.outputs, result

    def moments(
        self,
        path: str,
        reference: ReferenceInputs,
        calls: list[Call],
        hidden: list[mx.array],
        run: Callable[[Call, mx.array], mx.array],
    ) -> Moments:
        """Second moments of a layer's inputs after the quantized layers."""
        own, total = {path: self.modules[path]}, None
        for number, (call, state) in enumerate(zip(calls, hidden, strict=True)):
            # Lazy: only what the layer's inputs depend on is computed.
            fed = inputs(own, lambda c=call, h=state: run(c, h), evaluate=False)[0][path]
            batch = Moments.of(fed, reference.fed(number, path))
            total = batch if total is None else total + batch
            mx.eval(total.arrays())
        assert total is not None
        return total

    def experts(
        self,
        paths: list[str],
        calls: list[Call],
        hidden: list[mx.array],
        run: Callable[[Call, mx.array], mx.array],
    ) -> None:
        """Round stacks of experts that are fed the same, each expert by the tokens routed to it."""
        path, feds = paths[0], []
        for call, state in zip(calls, hidden, strict=True):
            own = {path: self.modules[path]}
            fed = inputs(own, lambda c=call, h=state: run(c, h), evaluate=False)[0][path]
            mx.eval(fed.inputs, fed.indices)
            feds.append(fed)
        weights = {path: self.problem.weights[path] for path in paths}
        self.keep(experts(self.rounding, weights, feds))

    def head(
        self,
        paths: list[str],
        data: list[mx.array],
        recorded: list[Recording],
        hidden: list[mx.array],
    ) -> None:
        """Refine the modules after the last decoder layer, such as an untied lm_head."""
        modules = {path: self.modules[path] for path in paths}
        totals: dict[str, mx.array] = {}
        for tokens, recording, state in zip(data, recorded, hidden, strict=True):
            found, _ = inputs(
                modules,
                lambda t=tokens, r=recording, h=state: finish(self.problem.model, t, r, h),
                evaluate=False,
            )
            for path, fed in found.items():
                moment = fed.rows().T @ fed.rows()
                totals[path] = totals[path] + moment if path in totals else moment
            mx.eval(totals)
        for path in paths:
            if path in totals:
                self.keep(self.stage([path]).rounded(Metric(totals[path])))
            else:
                self.store(path, self.plain(path))
