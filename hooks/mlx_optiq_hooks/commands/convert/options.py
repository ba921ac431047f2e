"""The options of ``mlx_lm.convert``."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mlx_optiq_ext.planning import Budget
    from mlx_optiq_ext.weights import Pin

#: Title of a group in the help -> its options.
GROUPS = {
    "budget": (
        "budget",
        "min_tps",
        "max_kl",
        "dry_run",
        "plan",
        "bits",
        "group_sizes",
        "pin",
        "protect",
    ),
    "calibration": ("calibration", "sensitivity"),
    "effort": ("effort",),
    "KV cache": ("kv_budget", "kv_only"),
}


class Speed(NamedTuple):
    """What ``--optiq-min-tps`` asks for: tokens per second on a chip."""

    tps: float
    chip: str = "auto"


@dataclass(frozen=True)
class Options:
    """Options of the command line, and defaults for those that were not given.

    Each field is named after its option; None, or False, if that was not given.
    """

    budget: "tuple[Budget, ...] | None" = None
    dry_run: bool = False
    min_tps: Speed | None = None
    max_kl: float | None = None
    plan: Path | None = None
    bits: tuple[int, ...] | None = None
    group_sizes: tuple[int, ...] | None = None
    pin: "Sequence[Pin]" = ()
    sensitivity: str | None = None
    protect: bool = False
    calibration: Path | None = None
    effort: str | None = None
    report: Path | None = None
    keep_unused_modalities: bool = False
    kv_budget: float | None = None
    kv_only: bool = False
    model_type: str | None = None

    @property
    def planned(self) -> bool:
        """Whether the weights are quantized by plan."""
        return any(each is not None for each in (self.budget, self.min_tps, self.max_kl, self.plan))

    @property
    def forecast(self) -> bool:
        """Whether conversions are only planned and judged, and nothing is written."""
        return self.dry_run or (self.budget is not None and len(self.budget) > 1)

    @property
    def how_far(self) -> str:
        """The effort, given or not."""
        return self.effort or ("refine" if self.plan is None else "plan")

    @property
    def text_only(self) -> bool:
        """Whether a multimodal checkpoint becomes the text model in it."""
        return self.planned and not self.keep_unused_modalities


def bits_above(least: float, what: str):
    """A parser for a budget in stored bits, above ``least`` and up to 16."""

    def parse(text: str) -> float:
        value = _number(text)
        if not least < value <= 16:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number of bits per {what} above {least:g} and up to 16, such "
                "as 4.5"
            )
        return value

    return parse


def budgets(text: str) -> "tuple[Budget, ...]":
    """A parser for budgets of the weights."""
    from mlx_optiq_ext.errors import InputError
    from mlx_optiq_ext.planning import Budget

    try:
        return Budget.parse_list(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def pin(text: str) -> "Pin":
    """A parser for the precision of some tensors."""
    from mlx_optiq_ext.errors import InputError
    from mlx_optiq_ext.weights import Pin

    try:
        return Pin.parse(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def speed(text: str) -> Speed:
    """A parser for ``TPS`` or ``TPS@CHIP``."""
    number, _, chip = text.partition("@")
    tps = _number(number)
    if not 0 < tps < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not tokens per second above 0, such as 40 or 40@m4-max-40"
        )
    return Speed(tps, chip) if chip else Speed(tps)


def divergence(text: str) -> float:
    """A parser for a KL divergence in nats per token."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a KL divergence in nats per token above 0, such as 0.05"
        )
    return value


def choices(allowed: tuple[int, ...], what: str):
    """A parser for a comma-separated list of allowed numbers."""

    def parse(text: str) -> tuple[int, ...]:
        try:
            values = tuple(sorted({int(part) for part in text.split(",")}))
        except ValueError:
            values = ()
        if not values or not set(values) <= set(allowed):
            names = ", ".join(map(str, allowed))
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a comma-separated list of {what} that MLX packs: {names}"
            )
        return values

    return parse


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def add_arguments(group):
    """Add the options of ``mlx_lm.convert`` to an argparse group."""
    from mlx_optiq_ext.weights import BITS, EFFORTS, GROUP_SIZES
    from mlx_optiq_ext.weights.sensitivity import registry

    from ...installation import sensitivity_methods

    group.add_argument(
        "--optiq-budget",
        metavar="BUDGET",
        type=budgets,
        help="Quantize each tensor at its own bits and group size, within this many bits per "
        "weight as printed after conversion (uniform 4-bit at group size 64 takes 4.5), a size of "
        "all weight files (8GB, 7.5GiB), or a share of what they take in 16 bits (30%%). "
        "Several with commas between them are compared, as with --optiq-dry-run.",
    )
    group.add_argument(
        "--optiq-dry-run",
        action="store_true",
        default=None,
        help="Convert nothing: print the plan, its size, the KL to expect, and the time and memory "
        "that the conversion would take. Needs --optiq-budget.",
    )
    group.add_argument(
        "--optiq-min-tps",
        metavar="TPS[@CHIP]",
        type=speed,
        help="In place of a budget: the largest one whose model is predicted to generate this many "
        "tokens per second on a chip (mlx_lm.benchmark --optiq-predict list; default: this one).",
    )
    group.add_argument(
        "--optiq-max-kl",
        metavar="NATS",
        type=divergence,
        help="In place of a budget: the smallest model whose KL divergence from the original is at "
        "most this many nats per token, with 95 %% confidence on held-out calibration text. "
        "Converts a few times to find it.",
    )
    group.add_argument(
        "--optiq-effort",
        choices=EFFORTS,
        help="How far to go. plan: choose bits and round as MLX does. refine: round behind the "
        "layers that are quantized already (GPTQ-style). distill: then tune codes, scales, biases "
        "and norms against the original's logits. Each takes longer and loses less. Default: "
        "refine; plan with --optiq-plan.",
    )
    group.add_argument(
        "--optiq-plan",
        metavar="PATH",
        type=Path,
        help="Apply a saved plan (optiq_metadata.json, edited or not, or its folder) without "
        "measuring.",
    )
    group.add_argument(
        "--optiq-bits",
        metavar="LIST",
        type=choices(BITS, "widths"),
        help=f"Bits to choose from. Default: {_listed(BITS)} and unquantized.",
    )
    group.add_argument(
        "--optiq-group-sizes",
        metavar="LIST",
        type=choices(GROUP_SIZES, "group sizes"),
        help=f"Group sizes to choose from. Default: {_listed(GROUP_SIZES)}.",
    )
    group.add_argument(
        "--optiq-pin",
        metavar="PATTERN=BITS[gGROUP]",
        action="append",
        type=pin,
        help="Give the tensors whose module paths match a pattern these bits (and group size), "
        "such as '*.v_proj=8g64', or leave them alone with 16; the rest is planned within what is "
        "left of the budget. May be given many times; the last that matches counts.",
    )
    group.add_argument(
        "--optiq-protect",
        action="store_true",
        default=None,
        help="Keep embeddings, head and the first and last layer at 8 bits or more.",
    )
    group.add_argument(
        "--optiq-sensitivity",
        choices=sensitivity_methods(),
        help="How to measure each tensor's sensitivity. "
        f"{'; '.join(map(registry.summary, sensitivity_methods()))}. Default: {registry.DEFAULT}.",
    )
    group.add_argument(
        "--optiq-calibration",
        metavar="FILE",
        type=Path,
        help="Calibration text (.txt or .jsonl). Default: mlx-lm's own calibration data.",
    )
    group.add_argument(
        "--optiq-report",
        metavar="FILE",
        type=Path,
        help="Write a web page that shows each tensor's bits and sensitivity, and uniform "
        "quantization beside the plan (FILE.html); with --optiq-dry-run or several budgets draw KL "
        "and perplexity against size (FILE.svg). Needs --optiq-budget.",
    )
    group.add_argument(
        "--optiq-keep-unused-modalities",
        action="store_true",
        default=None,
        help="Keep the multimodal class and config of a vision-language or audio checkpoint. "
        "Default: convert to the text model in it.",
    )
    group.add_argument(
        "--optiq-kv-budget",
        metavar="BITS",
        type=bits_above(2, "element"),
        help="Plan each layer's keys and values within this many stored bits per element and "
        "write kv_config.json beside the weights, for --optiq-kv auto (4-bit at group size 64 "
        "takes 4.5).",
    )
    group.add_argument(
        "--optiq-kv-only",
        action="store_true",
        default=None,
        help="Convert nothing: write the KV plan beside the MLX model at --hf-path.",
    )
    group.add_argument(
        "--optiq-model-type",
        choices=("yolo",),
        help="What --hf-path is, if not a language model. yolo: a YOLO26 checkpoint (.pt, "
        ".safetensors or .npz); --optiq-calibration is then a folder with a few images.",
    )


def _listed(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))
