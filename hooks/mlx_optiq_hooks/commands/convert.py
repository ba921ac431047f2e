"""Our options of ``mlx_lm.convert`` and what is refused before anything is loaded."""

import argparse
import math
from pathlib import Path

from mlx_optiq_ext.errors import InputError

#: Options that mean nothing without --optiq-budget or --optiq-plan.
DEPENDENT = (
    "bits",
    "group_sizes",
    "sensitivity",
    "calibration",
    "keep_unused_modalities",
    "refine",
    "distill",
    "protect",
    "report",
)

#: Options that say how to choose a plan; one of them at most.
CHOOSING = ("budget", "min_tps", "plan")

#: Options that a KV plan uses too.
SHARED = ("calibration",)


def bits_above(least: float, what: str):
    """A parser for a budget in stored bits, above ``least`` and up to 16."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least < value <= 16:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number of bits per {what} above {least:g} and up to 16, such "
                "as 4.5"
            )
        return value

    return parse


def speed(text: str) -> tuple[float, str]:
    """A parser for ``TPS`` or ``TPS@CHIP``."""
    number, _, chip = text.partition("@")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not tokens per second above 0, such as 40 or 40@m4-max-40"
        )
    return value, chip or "auto"


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


def add_arguments(group):
    from ..installation import sensitivity_methods

    group.add_argument(
        "--optiq-budget",
        metavar="BPW",
        type=bits_above(0, "weight"),
        help="Quantize each tensor at its own bits and group size, within this many bits per "
        "weight as printed after conversion (uniform 4-bit at group size 64 takes 4.5).",
    )
    group.add_argument(
        "--optiq-min-tps",
        metavar="TPS[@CHIP]",
        type=speed,
        help="In place of a budget: the largest one whose model is predicted to generate this many "
        "tokens per second on a chip (mlx_lm.benchmark --optiq-predict list; default: this one).",
    )
    group.add_argument(
        "--optiq-refine",
        action="store_true",
        default=None,
        help="Round with error feedback behind the quantized layers; takes longer, loses less.",
    )
    group.add_argument(
        "--optiq-distill",
        action="store_true",
        default=None,
        help="Refine, then tune scales and biases against the original's logits.",
    )
    group.add_argument(
        "--optiq-plan",
        metavar="FILE",
        type=Path,
        help="Apply a saved plan (optiq_metadata.json, edited or not) without measuring.",
    )
    group.add_argument(
        "--optiq-bits",
        metavar="LIST",
        type=choices((2, 3, 4, 5, 6, 8), "widths"),
        help="Bits to choose from. Default: 2,3,4,5,6,8 and unquantized.",
    )
    group.add_argument(
        "--optiq-group-sizes",
        metavar="LIST",
        type=choices((32, 64, 128), "group sizes"),
        help="Group sizes to choose from. Default: 32,64,128.",
    )
    group.add_argument(
        "--optiq-protect",
        action="store_true",
        default=None,
        help="Keep embeddings, head and the first and last layer at 8 bits or more.",
    )
    group.add_argument(
        "--optiq-sensitivity",
        choices=sorted(sensitivity_methods()),
        help="How to measure what each tensor costs: from one backward pass (taylor) or with one "
        "probe a tensor (kl). Default: taylor.",
    )
    group.add_argument(
        "--optiq-calibration",
        metavar="FILE",
        type=Path,
        help="Calibration text (.txt or .jsonl). Default: mlx-lm's own calibration data.",
    )
    group.add_argument(
        "--optiq-report",
        metavar="FILE.html",
        type=Path,
        help="Write a web page that shows each tensor's bits, what it costs, and uniform "
        "quantization beside the plan. Needs --optiq-budget.",
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


def check(options, args):
    if options.model_type is not None:
        return  # not a language model: yolo_options checks it
    alone = set(_given(options)) <= {"kv_budget", "kv_only", *SHARED}
    if options.kv_budget is not None or options.kv_only:
        check_kv(options, args)
        if alone:
            return
    check_weights(options, args)


def check_kv(options, args):
    """Refuse what a KV plan cannot be made of."""
    from mlx_optiq_ext.planning.texts import read_texts

    from ..installation import gate

    gate().require("kv")
    if options.kv_budget is None:
        raise InputError("--optiq-kv-only needs --optiq-kv-budget, such as --optiq-kv-budget 4.5")
    if options.kv_only:
        other = set(_given(options)) - {"kv_budget", "kv_only", *SHARED}
        if other:
            raise InputError(f"--optiq-kv-only converts nothing: leave {_flags(sorted(other))} out")
        if not (Path(args.hf_path) / "config.json").exists():
            raise InputError(
                f"--optiq-kv-only writes beside an MLX model: {args.hf_path} is not a folder with "
                "one"
            )
    if options.calibration is not None:
        read_texts(options.calibration)


def check_weights(options, args):
    from mlx_optiq_ext.planning.texts import read_texts
    from mlx_optiq_ext.weights.plan_file import read_entries
    from mlx_optiq_ext.weights.report import check_target

    from ..installation import gate

    gate().require("weights")
    given = [name for name in _given(options) if not name.startswith("kv_")]
    chosen = [name for name in CHOOSING if getattr(options, name) is not None]
    if not chosen:
        if set(given) <= set(DEPENDENT):
            raise InputError(
                f"{_flags(given)} needs --optiq-budget, such as --optiq-budget 4.5, "
                "--optiq-min-tps or --optiq-plan"
            )
        return
    if options.min_tps is not None:
        if options.budget is not None:
            raise InputError(
                "--optiq-budget and --optiq-min-tps both decide the size: leave one of them out"
            )
        from mlx_optiq_ext.latency import find_chip

        gate().require("latency")
        find_chip(options.min_tps[1])
    if options.plan is not None:
        clash = set(given) & {"budget", "min_tps", "bits", "group_sizes", "sensitivity", "protect"}
        if clash:
            raise InputError(
                f"--optiq-plan decides already what {_flags(sorted(clash))} would: "
                "leave one of them out"
            )
        if options.report is not None:
            raise InputError(
                "--optiq-report shows measurements and needs --optiq-budget: leave out --optiq-plan"
            )
        read_entries(options.plan)
    if not options.keep_unused_modalities:
        gate().require("modalities")
    own = _flags(chosen)
    stock = {
        "--quant-predicate": args.quant_predicate is not None,
        "--q-bits": args.q_bits is not None,
        "--q-group-size": args.q_group_size is not None,
        f"--q-mode {args.q_mode}": args.q_mode != "affine",
        "--dequantize": args.dequantize,
    }
    for name, used in stock.items():
        if used:
            raise InputError(f"{own} and {name} both decide how to quantize: leave one of them out")
    if Path(args.mlx_path).exists():
        raise InputError(
            f"{args.mlx_path} exists already: remove it or name another folder with --mlx-path"
        )
    if options.calibration is not None:
        read_texts(options.calibration)
    if options.report is not None:
        check_target(options.report)


def _given(options) -> list[str]:
    return [name for name, value in vars(options).items() if value is not None]


def _flags(names) -> str:
    return ", ".join(f"--optiq-{name.replace('_', '-')}" for name in names)
