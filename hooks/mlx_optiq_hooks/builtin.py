"""Our own hookimpls: this package is its own first plugin."""

import argparse
import math
from pathlib import Path

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.plugins import hookimpl

from . import session


def budget(text: str) -> float:
    """Parse bits per weight."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 16:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of bits per weight above 0 and up to 16, such as 4.5"
        )
    return value


def _choices(allowed: tuple[int, ...], what: str):
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


@hookimpl
def optiq_add_arguments(command, group):
    if command != "convert":
        return
    from . import sensitivity_methods

    group.add_argument(
        "--optiq-budget",
        metavar="BPW",
        type=budget,
        help="Quantize each tensor at its own bits and group size, within this many bits per "
        "weight as printed after conversion (uniform 4-bit at group size 64 takes 4.5).",
    )
    group.add_argument(
        "--optiq-bits",
        metavar="LIST",
        type=_choices((2, 3, 4, 5, 6, 8), "widths"),
        help="Bits to choose from. Default: 2,3,4,5,6,8 and unquantized.",
    )
    group.add_argument(
        "--optiq-group-sizes",
        metavar="LIST",
        type=_choices((32, 64, 128), "group sizes"),
        help="Group sizes to choose from. Default: 32,64,128.",
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
        "--optiq-keep-unused-modalities",
        action="store_true",
        default=None,
        help="Keep the multimodal class and config of a vision-language or audio checkpoint. "
        "Default: convert to the text model in it.",
    )


@hookimpl
def optiq_check_options(command, options, args):
    if command == "convert":
        _check_convert(options, args)


def _check_convert(options, args):
    from mlx_optiq_ext.weights.calibration import read_texts

    from . import gate

    gate().require("weights")
    if options.budget is None:
        given = [name for name, value in vars(options).items() if value is not None]
        names = ", ".join(f"--optiq-{name.replace('_', '-')}" for name in given)
        if set(given) <= {
            "bits",
            "group_sizes",
            "sensitivity",
            "calibration",
            "keep_unused_modalities",
        }:
            raise InputError(f"{names} needs --optiq-budget, such as --optiq-budget 4.5")
        return
    if not options.keep_unused_modalities:
        gate().require("modalities")
    stock = {
        "--quant-predicate": args.quant_predicate is not None,
        "--q-bits": args.q_bits is not None,
        "--q-group-size": args.q_group_size is not None,
        f"--q-mode {args.q_mode}": args.q_mode != "affine",
        "--dequantize": args.dequantize,
    }
    for name, used in stock.items():
        if used:
            raise InputError(
                f"--optiq-budget and {name} both decide how to quantize: leave one of them out"
            )
    if Path(args.mlx_path).exists():
        raise InputError(
            f"{args.mlx_path} exists already: remove it or name another folder with --mlx-path"
        )
    if options.calibration is not None:
        read_texts(options.calibration)


@hookimpl
def optiq_sensitivity_methods():
    from mlx_optiq_ext.weights import METHODS

    return dict(METHODS)


@hookimpl
def optiq_quant_predicate(model, config, options):
    running = session.current()
    plan = running.results.get("plan") if running else None
    return plan.predicate() if plan else None
