"""A finished choice of precisions, and the file that records it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .. import files
from ..errors import InputError, OptiqError
from ..planning.calibration import on
from .precision import Precision

FILE = "optiq_metadata.json"


#: Prefix of the method of a plan that was read from a file.
READ_FROM = "read from "


@dataclass(frozen=True)
class Uniform:
    """A uniform quantization beside a plan.

    Attributes:
        precision: Precision of every tensor, except where the model's own predicate asks for
            another.
        bpw: Bits per weight.
        kl: End-to-end KL on the same sequences as the plan's, in nats per token.
    """

    precision: Precision
    bpw: float
    kl: float


@dataclass(frozen=True)
class Plan:
    """The precision of each tensor.

    Attributes:
        precisions: Tensor path -> precision, for every candidate tensor.
        sensitivities: Tensor path -> expected KL in nats per token of its precision.
        method: Name of the sensitivity method.
        target_bpw: The budget, in bits per weight as mlx-lm counts them.
        achieved_bpw: Bits per weight of the plan.
        kl: End-to-end KL on held-out calibration sequences, in nats per token, if measured.
        variant: Name of this plan among those that were tried.
        below: The largest uniform quantization within the budget, if there is one.
        above: The smallest uniform quantization above the budget, if there is one.
        calibration: Source, number of sequences and their length.
        versions: Versions of the packages that made the plan.
        notes: What could not be done as asked, one line each.
        budget: The budget as it was asked for, if that is not in bits per weight.
        limit: Bytes that the weight files may take, if the budget is a size.
        certificate: How far the finished model is from the original, with a bound, if one was asked
            for; see `targets.Certificate.entry`.
    """

    precisions: dict[str, Precision]
    sensitivities: dict[str, float]
    method: str
    target_bpw: float
    achieved_bpw: float
    kl: float | None = None
    variant: str = "allocated"
    below: Uniform | None = None
    above: Uniform | None = None
    calibration: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    budget: str = ""
    limit: int | None = None
    certificate: dict[str, Any] | None = None

    def beside(self, alone: dict[str, Precision]) -> "Plan":
        """The plan with tensors that were left alone, by path, among its precisions."""
        return replace(
            self,
            precisions={**self.precisions, **alone},
            sensitivities={**self.sensitivities, **dict.fromkeys(alone, 0.0)},
        )

    @property
    def aim(self) -> str:
        """The budget as it was asked for."""
        return self.budget or f"{self.target_bpw:g}"

    @property
    def default(self) -> Precision:
        """The most common precision, for config.json's top level.

        Its group size is the smallest one of the plan: mlx-lm skips a tensor, before it calls a
        predicate, if the default group size does not divide its last axis.
        """
        quantized = [p for p in self.precisions.values() if p.quantized]
        if not quantized:
            return Precision(4, 32)
        (bits, _), *_ = Counter(p.bits for p in quantized).most_common()
        return Precision(bits, min(p.group_size for p in quantized))

    def predicate(self) -> Callable[..., bool | dict[str, Any]]:
        """The plan as mlx-lm's ``quant_predicate``.

        The predicate raises OptiqError for a tensor whose last axis the planned group size does not
        divide; a module that is not in the plan is not quantized.
        """

        def predicate(path: str, module: Any) -> bool | dict[str, Any]:
            precision = self.precisions.get(path)
            if precision is None or not precision.quantized:
                return False
            if module.weight.shape[-1] % precision.group_size:
                raise OptiqError(
                    f"the plan has {path} in groups of {precision.group_size}, but its last axis "
                    f"is {module.weight.shape[-1]}: measure this model again"
                )
            return precision.settings

        return predicate

    def summary(self) -> str:
        """A few lines for the terminal."""
        counts = Counter(str(p) for p in self.precisions.values())
        parts = ", ".join(f"{n} x {name}" for name, n in sorted(counts.items()))
        read = self.method.startswith(READ_FROM)
        aim = "" if read else f" of a budget of {self.aim}"
        made = f"plan {self.method}" if read else f"plan: {self.variant}"
        lines = [f"[optiq] {self.achieved_bpw:.3f} bits per weight{aim}: {parts} ({made})"]
        if self.kl is not None:
            lines.append(
                f"[optiq] KL to the unquantized model on {self.judged_on}: {self.kl:.4g} nats per "
                "token"
            )
            for side, other in (("below", self.below), ("above", self.above)):
                if other is not None and other.kl > 0:
                    lines.append(
                        f"[optiq] nearest stock uniform {side}: {other.precision} at "
                        f"{other.bpw:.3f} bits per weight, {other.kl:.4g} on the same text (the "
                        f"plan has {times(self.kl / other.kl)} that)"
                    )
        return "\n".join(lines)

    @property
    def judged_on(self) -> str:
        """The text that ``kl`` was measured on."""
        source = self.calibration.get("source")
        return f"held-out text {on(source)}" if source else "held-out calibration text"

    def save(
        self,
        folder: Path,
        post_processing: Sequence[dict[str, Any]] = (),
        origin: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Write ``optiq_metadata.json`` into a model folder.

        Args:
            folder: The model folder.
            post_processing: What else was done to the model, one entry per operation.
            origin: Entries that say what was converted, and by which command.
        """
        files.write_json(
            folder / FILE,
            {
                **origin,
                "method": self.method,
                "target_bpw": self.target_bpw,
                **({"budget": self.budget} if self.budget else {}),
                "achieved_bpw": round(self.achieved_bpw, 6),
                "kl": self.kl,
                "variant": self.variant,
                "uniform": self.below
                and {
                    **_entry(self.below.precision),
                    "bpw": round(self.below.bpw, 6),
                    "kl": self.below.kl,
                },
                "uniform_above": self.above
                and {
                    **_entry(self.above.precision),
                    "bpw": round(self.above.bpw, 6),
                    "kl": self.above.kl,
                },
                "per_layer": {
                    path: {
                        **_entry(precision),
                        "kl": self.sensitivities[path],
                    }
                    for path, precision in self.precisions.items()
                },
                "calibration": self.calibration,
                "versions": self.versions,
                "post_processing": list(post_processing),
                **({"certificate": self.certificate} if self.certificate else {}),
                **({"notes": list(self.notes)} if self.notes else {}),
            },
        )


def times(ratio: float) -> str:
    """A ratio for the terminal, with two significant digits."""
    return f"{ratio:.2f} x" if ratio >= 0.1 or ratio == 0 else f"{ratio:.2g} x"


def _entry(precision: Precision) -> dict[str, Any]:
    return {"bits": precision.bits, **precision.settings}


def check_written(folder: Path, plan: Plan) -> None:
    """Make sure that a converted folder holds complete files with the plan's precisions.

    Raises:
        OptiqError: A weight file is cut off, a planned tensor is missing from config.json, or the
            files are larger than the plan's budget.
    """
    config = files.read_json(folder / "config.json", files.MODEL_CONFIG)
    written = config.get("quantization", {})
    for path, precision in plan.precisions.items():
        entry = written.get(path)
        found = Precision.of(entry) if isinstance(entry, dict) else None
        if found != (precision if precision.quantized else None):
            raise OptiqError(
                f"{path} was planned as {precision} but written as {found or 'unquantized'}: "
                "mlx-lm did not follow the plan; please report this with your mlx-lm version"
            )
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        raise InputError(f"no weights were written to {folder}")
    for path in weights:
        _check_complete(path)
    taken = sum(path.stat().st_size for path in weights)
    if plan.limit is not None and taken > plan.limit:
        raise OptiqError(
            f"the weight files take {taken:,} bytes of a budget of {plan.budget} ({plan.limit:,} "
            "bytes): please report this with your mlx-lm version"
        )


def _check_complete(path: Path) -> None:
    try:
        files.read_header(path)
    except InputError as error:
        raise OptiqError(f"{path.name} was not written completely: is the disk full?") from error
