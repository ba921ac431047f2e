"""Settings of a conversion."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..model.layers import quantizable
from ..planning.budget import Budget
from ..planning.calibration import DEFAULT, Sampling
from .candidates import Tensor, tensors
from .pins import Pin, pinned
from .precision import BITS, GROUP_SIZES, Precision
from .rounding.distillation.settings import Settings
from .sensitivity import registry
from .sensitivity.method import Method

#: How far a conversion goes; each includes what is before it.
EFFORTS = PLAN, REFINE, DISTILL = "plan", "refine", "distill"


@dataclass(frozen=True)
class Request:
    """Settings of a conversion, from the options of the command to the last step.

    A plan is chosen by one of ``budget``, ``min_tps``, ``max_kl`` and ``plan_file``.

    Attributes:
        budget: Bits per weight as mlx-lm prints them (all stored bits over all parameters), or a
            `Budget`, which may be a size of the weight files.
        min_tps: Least predicted tokens per second of the converted model.
        chip: The chip of that prediction, for `latency.find_chip`.
        max_kl: Most KL from the original in nats per token; the smallest model that is within it
            with 95 % confidence is made.
        plan_file: A plan to apply instead of measuring one.
        bits: Widths to choose from; None for all, with "leave unquantized" among the candidates.
        group_sizes: Group sizes to choose from; None for all.
        pins: Precisions of some tensors, beside which the rest is planned; the last one that
            matches a tensor counts.
        protect: Whether both ends of the model must keep 8 bits or more.
        method: How to measure sensitivity: a registered name, or a method itself.
        calibration: A text or JSON-lines file; None for mlx-lm's own text.
        sampling: Length and number of the calibration sequences.
        effort: One of `EFFORTS`: only plan; also refine, that is round with error feedback
            (GPTQ-style rounding); also distill, that is tune what is stored after that.
        distillation: Settings of distillation.
        scratch: Folder for temporary files of a model too large for memory; None for the cache.
        progress: Whether to show progress bars.
        say: Receives one-line messages.

    Raises:
        InputError: There is no such effort, or ``max_kl`` is not above 0.
    """

    budget: float | Budget | None = None
    min_tps: float | None = None
    chip: str | None = None
    max_kl: float | None = None
    plan_file: Path | None = None
    bits: tuple[int, ...] | None = None
    group_sizes: tuple[int, ...] | None = None
    pins: tuple[Pin, ...] = ()
    protect: bool = False
    method: str | Method = registry.DEFAULT
    calibration: Path | None = None
    sampling: Sampling = DEFAULT
    effort: str = REFINE
    distillation: Settings = field(default_factory=Settings)
    scratch: Path | None = None
    progress: bool = True
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        if self.effort not in EFFORTS:
            raise InputError(f"there is no effort {self.effort!r}: give {', '.join(EFFORTS)}")
        if self.max_kl is not None and not 0 < self.max_kl < float("inf"):
            raise InputError(
                f"a KL of {self.max_kl:g} nats per token cannot be met: give one above 0"
            )

    @property
    def refine(self) -> bool:
        """Whether to round with error feedback."""
        return self.effort != PLAN

    @property
    def distill(self) -> bool:
        """Whether to tune what is stored after that."""
        return self.effort == DISTILL

    @property
    def sensitivity(self) -> Method:
        """The method itself.

        Raises:
            InputError: No method has that name.
        """
        return registry.find(self.method) if isinstance(self.method, str) else self.method

    def candidates(self, model: Any) -> tuple[Tensor, ...]:
        """The tensors of a model that are to be planned; nothing is evaluated.

        Raises:
            InputError: No tensor can be quantized, or a pin does not go with the model.
        """
        return self._divided(model)[0]

    def alone(self, model: Any) -> dict[str, Precision]:
        """Path -> unquantized precision of the tensors that pins leave alone; nothing is evaluated.

        Raises:
            InputError: See `candidates`.
        """
        return self._divided(model)[1]

    def _divided(self, model: Any) -> tuple[tuple[Tensor, ...], dict[str, Precision]]:
        groups = self.group_sizes or GROUP_SIZES
        if self.plan_file is not None:
            found = tensors(model, allow_unquantized=True)
        else:
            found = tensors(model, self.bits or BITS, groups, allow_unquantized=self.bits is None)
        if not found:
            raise InputError(
                "no tensor of this model can be quantized in groups of "
                f"{', '.join(map(str, groups))}: give other --optiq-group-sizes"
            )
        if not self.pins:
            return tuple(found), {}
        paths = [path for path, _ in quantizable(model)]
        planned, alone = pinned(found, paths, self.pins, groups)
        if not planned:
            raise InputError("the pins leave all tensors of this model alone: nothing to quantize")
        return tuple(planned), alone
