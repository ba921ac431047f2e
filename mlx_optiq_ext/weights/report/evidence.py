"""Evidence for a plan: uniform precisions judged beside it, and each tensor's extra bits."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from ...errors import InputError
from ...model.layers import layer_index
from ..candidates import Size, Tensor
from ..plan import Plan
from ..plan_search import Study, stored, uniformly
from ..precision import Precision
from ..sensitivity.problem import Problem, Sensitivity, end_to_end

#: Widths of the uniform precisions that a plan is shown against.
UNIFORM_BITS = (3, 4, 5, 6)


@dataclass(frozen=True)
class Judged:
    """A uniform precision judged end to end.

    Attributes:
        precision: Precision of every tensor, except where the model's own predicate asks for
            another.
        stored_bits: Stored bits of all candidate tensors together.
        kl: KL on the held-out calibration sequences, in nats per token.
    """

    precision: Precision
    stored_bits: int
    kl: float


@dataclass(frozen=True)
class Gain:
    """A tensor that takes more bits than the average.

    Attributes:
        tensor: The tensor.
        precision: What the plan gives it.
        sensitivity: At the common precision, in nats per token; None if that is no candidate.
        planned: Its sensitivity at the planned precision.
        share: Its share of all tensors' sensitivity at the common precision; None without one.
        weight_share: Share of all candidate weights.
        extra_bits: Stored bits above those of the common precision.
    """

    tensor: Tensor
    precision: Precision
    sensitivity: float | None
    planned: float
    share: float | None
    weight_share: float
    extra_bits: int


@dataclass(frozen=True)
class Evidence:
    """All data of a report; every number on the page comes from here.

    Attributes:
        name: The model's name, as the user gave it.
        plan: The plan.
        tensors: Its candidate tensors, in the model's order.
        layers: Tensor path -> index of its decoder layer; tensors outside of them are absent.
        sensitivity: Expected KL of every candidate of every tensor, in nats per token.
        size: The model's counts.
        uniforms: Uniform precisions, judged on the sequences of the plan, by rising stored bits.
        judged_on: Number of tokens that they were judged on.
        held_out: Whether these tokens were not measured on; too few sequences leave none.
        refined: Whether the plan's weights were refined before it was judged.
    """

    name: str
    plan: Plan
    tensors: tuple[Tensor, ...]
    layers: Mapping[str, int]
    sensitivity: Sensitivity
    size: Size
    uniforms: tuple[Judged, ...]
    judged_on: int
    held_out: bool = True
    refined: bool = False

    @property
    def kl(self) -> float:
        """End-to-end KL of the plan, in nats per token."""
        assert self.plan.kl is not None, "gather sees to it"
        return self.plan.kl

    @cached_property
    def stored_bits(self) -> int:
        """Stored bits of the candidates as planned."""
        return stored(self.tensors, self.plan.precisions)

    @cached_property
    def elements(self) -> int:
        """Elements of the candidates."""
        return sum(t.size for t in self.tensors)

    @property
    def average(self) -> float:
        """Stored bits per weight of the candidates as planned."""
        return self.stored_bits / self.elements

    @property
    def unquantized_bits(self) -> int:
        """Stored bits of the candidates as they are in the original."""
        return stored(self.tensors, {t.path: t.unquantized for t in self.tensors})

    def model_bits(self, stored_bits: int) -> int:
        """Stored bits of the whole model when the candidates take ``stored_bits``."""
        return self.size.fixed_bits + stored_bits

    @cached_property
    def common(self) -> Precision | None:
        """The precision to compare tensors at: a candidate of most of them, closest to the average.

        It takes at most the average bits if possible; None if nothing can be quantized.
        """
        counts = Counter(p for t in self.tensors for p in t.precisions if p.quantized)
        shared = [p for p, count in counts.items() if count == max(counts.values())]
        widths = {p: self._width(p) for p in shared}
        within = [p for p in shared if widths[p] <= self.average]
        if within:
            return max(within, key=lambda p: (widths[p], p.bits))
        return min(shared, key=lambda p: (widths[p], -p.bits), default=None)

    def _width(self, precision: Precision) -> float:
        """Stored bits per weight of a precision over the tensors that have it as a candidate."""
        having = [t for t in self.tensors if precision in t.precisions]
        return sum(t.stored_bits(precision) for t in having) / sum(t.size for t in having)

    def at_common(self, tensor: Tensor) -> float | None:
        """Sensitivity at the common precision; None if that is no candidate of the tensor."""
        return self.sensitivity[tensor.path].get(self.common) if self.common else None

    @cached_property
    def curve(self) -> list[tuple[Tensor, float]]:
        """Tensors with their sensitivity at the common precision, the most sensitive first."""
        found = [(t, value) for t in self.tensors if (value := self.at_common(t)) is not None]
        return sorted(found, key=lambda entry: (-entry[1], entry[0].path))

    @property
    def most_sensitive(self) -> list[tuple[Tensor, float]]:
        """The first tenth of the curve, one tensor at least."""
        return self.curve[: max(1, len(self.curve) // 10)]

    @cached_property
    def total_sensitivity(self) -> float:
        """Sum of all sensitivities at the common precision."""
        return math.fsum(value for _, value in self.curve)

    @cached_property
    def gains(self) -> list[Gain]:
        """Tensors above the average bits per weight, the most sensitive first."""
        common, found = self.common, []
        for tensor in self.tensors:
            precision, value = self.plan.precisions[tensor.path], self.at_common(tensor)
            bits = tensor.stored_bits(precision)
            if common is None or bits <= self.average * tensor.size:
                continue
            total = self.total_sensitivity
            share = None if value is None or total <= 0 else value / total
            extra = bits - tensor.stored_bits(common)
            part, now = tensor.size / self.elements, self.plan.sensitivities[tensor.path]
            found.append(Gain(tensor, precision, value, now, share, part, extra))
        return sorted(found, key=lambda g: (-(g.sensitivity or 0.0), -g.extra_bits, g.tensor.path))

    @property
    def nearest(self) -> dict[str, Judged]:
        """The uniform precisions next to the budget, judged with the plan, by their side of it."""
        sides = {"below": self.plan.below, "above": self.plan.above}
        return {
            side: Judged(
                uniform.precision,
                stored(self.tensors, uniformly(self.tensors, uniform.precision)),
                uniform.kl,
            )
            for side, uniform in sides.items()
            if uniform is not None
        }

    @cached_property
    def references(self) -> list[Judged]:
        """The uniform precisions, with those next to the budget among them."""
        found = {j.precision: j for j in (*self.uniforms, *self.nearest.values())}
        return sorted(found.values(), key=lambda j: (j.stored_bits, j.precision))

    @property
    def equal_bpw(self) -> float | None:
        """Bits per weight at which uniform precisions would reach the plan's KL.

        Interpolated between `uniforms`, linear in bits and in log KL; None outside of their range.
        """
        points = [(self.size.bits_per_weight(j.stored_bits), j.kl) for j in self.uniforms]
        goal = self.kl
        for (low, worse), (high, better) in pairwise(points):
            if worse >= goal >= better > 0 and worse > better:
                part = math.log(worse / goal) / math.log(worse / better)
                return low + part * (high - low)
        return None


def uniforms(problem: Problem) -> tuple[Judged, ...]:
    """Judge uniform 3, 4, 5 and 6 bits end to end, as stock would quantize.

    The group size is 64, mlx-lm's default, or 32 where 64 does not divide every tensor.

    Args:
        problem: The measured problem; its model is left as it was.

    Returns:
        The judged precisions, by rising stored bits. Each takes a pass over the held-out sequences,
        and the reference takes one.
    """
    tensors = problem.tensors
    group = 64 if all(t.own or Precision(4, 64).fits(t.shape) for t in tensors) else 32
    precisions = [Precision(bits, group) for bits in UNIFORM_BITS]
    choices = [uniformly(tensors, p) for p in precisions]
    divergences = end_to_end(problem, choices)
    found = [
        Judged(precision, stored(tensors, choice), kl)
        for precision, choice, kl in zip(precisions, choices, divergences, strict=True)
    ]
    return tuple(sorted(found, key=lambda j: j.stored_bits))


def gather(study: Study, plan: Plan, name: str) -> Evidence:
    """Measure what a report needs beyond a plan: the uniform precisions.

    Args:
        study: The measured model that the plan was made from.
        plan: The plan, with the KL that it ended up with.
        name: The model's name on the page.

    Raises:
        InputError: The plan was applied from a file, not measured.
    """
    if plan.kl is None or not study.sensitivity:
        raise InputError("a report shows measurements: give a budget instead of a saved plan")
    problem, data = study.problem, study.problem.calibration
    return Evidence(
        name=name,
        plan=plan,
        tensors=problem.tensors,
        layers=layer_index(problem.model),
        sensitivity=study.sensitivity,
        size=study.size,
        uniforms=uniforms(problem),
        judged_on=data.held_out.size,
        held_out=data.holds_out,
        refined=problem.refine,
    )
