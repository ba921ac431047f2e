"""Our options of ``mlx_lm.lora``, on the command line or in its YAML file."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_optiq_ext.errors import InputError

#: Options of a training.
TRAINING = ("rank_scaling", "init", "original", "no_compile")
#: Options that read an adapter and end the command.
READING = ("info", "export_peft")


def add_arguments(group):
    from mlx_optiq_ext.lora import DEFAULT_SCALING, SCALINGS

    group.add_argument(
        "--optiq-rank-scaling",
        choices=SCALINGS,
        nargs="?",
        const=DEFAULT_SCALING,
        help="How to spread the parameters of one LoRA rank over the layers: the same rank "
        "everywhere (constant), in proportion to the layers' bits (by_bits), or to the KL that "
        "their quantization costs (by_kl, also without a value).",
    )
    group.add_argument(
        "--optiq-init",
        choices=("residual",),
        help="Start the adapter from what quantization took away; needs --optiq-original.",
    )
    group.add_argument(
        "--optiq-original",
        metavar="MODEL",
        help="The unquantized model, for --optiq-init residual.",
    )
    group.add_argument(
        "--optiq-no-compile",
        action="store_true",
        default=None,
        help="Do not compile the training step: slower, and holds less memory.",
    )
    group.add_argument(
        "--optiq-info",
        metavar="DIR",
        type=Path,
        help="Print an adapter's ranks, parameters and norms layer by layer, and end.",
    )
    group.add_argument(
        "--optiq-export-peft",
        metavar="DIR",
        type=Path,
        help="Write PEFT's form of an adapter beside mlx-lm's, or mlx-lm's beside PEFT's, and end.",
    )


def check(options, args):
    from ..installation import gate

    gate().require("lora")
    reading = [name for name in READING if getattr(options, name) is not None]
    training = [name for name in TRAINING if getattr(options, name) is not None]
    if reading and (training or len(reading) > 1 or args.train or args.test):
        flag = f"--optiq-{reading[0].replace('_', '-')}"
        raise InputError(f"{flag} reads an adapter and ends: leave the other options out")
    if options.info is not None:
        return lambda: show(options.info)
    if options.export_peft is not None:
        return lambda: export(options.export_peft)
    return None


def show(folder: Path) -> None:
    """Print an adapter's table."""
    from mlx_optiq_ext import lora

    print(lora.table(lora.read_adapter(folder)))


def export(folder: Path) -> None:
    """Write the form that an adapter does not have yet."""
    from mlx_optiq_ext import lora

    print(lora.convert(folder))


def merged(options: SimpleNamespace | None, args: Any) -> SimpleNamespace | None:
    """Options of the command line, then those of the YAML file, which are taken out of ``args``.

    Returns None if none was given.

    Raises:
        InputError: A key of the file is unknown, or its value is.
    """
    from mlx_optiq_ext.lora import SCALINGS

    found = SimpleNamespace(**dict.fromkeys(TRAINING))
    allowed = {"rank_scaling": SCALINGS, "init": ("residual",), "no_compile": (True, False)}
    for key in [key for key in vars(args) if key.startswith("optiq_")]:
        name, value = key.removeprefix("optiq_"), vars(args).pop(key)
        if name not in TRAINING:
            known = ", ".join(f"optiq_{each}" for each in TRAINING)
            raise InputError(f"{key} in the YAML file is not known: there are {known}")
        if value is not None and value not in allowed.get(name, (value,)):
            names = ", ".join(map(str, allowed[name]))
            raise InputError(f"{key}: {value!r} in the YAML file is none of {names}")
        setattr(found, name, value or None)
    for name, value in vars(options).items() if options is not None else ():
        if value is not None:
            setattr(found, name, value)
    return found if wanted(found) else None


def wanted(options: SimpleNamespace | None) -> bool:
    """Whether an option of a training was given."""
    return any(getattr(options, name, None) is not None for name in TRAINING)


def check_training(options: SimpleNamespace, given: bool, args: Any) -> None:
    """Refuse what cannot be trained, with the command line and the YAML file put together.

    Args:
        options: From `merged`.
        given: Whether one of them stands on the command line.
        args: The command's, complete.
    """
    from mlx_optiq_ext import distributed

    if not args.train:
        if given:
            raise InputError("--optiq-* options of mlx_lm.lora need --train")
        return
    if args.fine_tune_type not in ("lora", "dora"):
        raise InputError(
            f"--fine-tune-type {args.fine_tune_type} has no ranks: leave the --optiq-* options out"
        )
    if (options.init is None) != (options.original is None):
        raise InputError(
            "--optiq-init residual and --optiq-original MODEL belong together: the residual is "
            "what the original has and the quantized model lacks"
        )
    parameters = args.lora_parameters
    rank = parameters.get("rank") if isinstance(parameters, dict) else None
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InputError(f"lora_parameters: rank is {rank!r}: give a whole number from 1 on")
    if not isinstance(scale, int | float) or isinstance(scale, bool) or scale <= 0:
        raise InputError(f"lora_parameters: scale is {scale!r}: give a number above 0")
    if args.batch_size % distributed.size():
        raise InputError(
            f"--batch-size {args.batch_size} does not divide over {distributed.size()} ranks: "
            f"give a multiple of {distributed.size()}"
        )
    file = args.resume_adapter_file
    if distributed.leads() and file is not None and not Path(file).is_file():
        raise InputError(f"--resume-adapter-file {file}: no such file")
