"""``mlx_lm.lora``: options on the command line or in its YAML file."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mlx_optiq_ext.errors import InputError

from ..engine import session
from ..engine.command import Run as Instead
from ..engine.options import given, read, spelled
from ..engine.session import Session

if TYPE_CHECKING:
    from mlx_optiq_ext.lora import Checkpoint, Request

#: Title of a group in the help -> its options.
GROUPS = {
    "training": ("rank_scaling", "init", "original", "no_compile"),
    "adapter files": ("info", "export_peft"),
}
#: Options of a training run.
TRAINING = ("rank_scaling", "init", "original", "no_compile")
#: Options that read an adapter instead of training one.
READING = ("info", "export_peft")
#: Initializations besides mlx-lm's own.
INITS = ("residual",)


@dataclass(frozen=True)
class Options:
    """Options of the command line or the YAML file; None, or False, if they were not given.

    Each field is named after its option.
    """

    rank_scaling: str | None = None
    init: str | None = None
    original: str | None = None
    no_compile: bool = False
    info: Path | None = None
    export_peft: Path | None = None

    @property
    def training(self) -> bool:
        """Whether an option of a training run was given."""
        return any(name in TRAINING for name in given(self))


@dataclass
class Run:
    """State of a command that trains with our options.

    Attributes:
        options: The options that were given.
        request: The options as the library takes them, while a training runs.
        checkpoint: How the adapter is saved, once the layers have their ranks.
        saved: The last file that was saved.
    """

    options: Options
    request: "Request | None" = None
    checkpoint: "Checkpoint | None" = None
    saved: Path | None = None

    def save(self, file: Path, tensors: Mapping[str, Any]) -> None:
        """Save a checkpoint."""
        assert self.checkpoint is not None
        self.checkpoint.write(file, tensors)
        self.saved = file


def add_arguments(group):
    """Add the options to an argparse group."""
    from mlx_optiq_ext.lora import DEFAULT_SCALING, SCALINGS

    group.add_argument(
        "--optiq-rank-scaling",
        choices=SCALINGS,
        nargs="?",
        const=DEFAULT_SCALING,
        help="How to spread the parameters of one LoRA rank over the layers: the same rank "
        "everywhere (constant), in proportion to the layers' bits (by_bits), or to the KL "
        f"divergence that their quantization causes (by_kl). Without a value: {DEFAULT_SCALING}.",
    )
    group.add_argument(
        "--optiq-init",
        choices=INITS,
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


def check(command, parsed, args) -> Instead | None:
    """Refuse unusable options; returns what runs in place of the training, if anything."""
    from ..installation import gate

    gate().require("lora")
    options = read(Options, parsed)
    reading = [name for name in READING if name in given(options)]
    if reading and (options.training or len(reading) > 1 or args.train or args.test):
        raise InputError(
            f"{spelled(reading[:1])} reads an adapter and ends: leave the other options out"
        )
    info, folder = options.info, options.export_peft
    if info is not None:
        return lambda: show(info)
    if folder is not None:
        return lambda: export(folder)
    return None


def show(folder: Path) -> None:
    """Print an adapter's table."""
    from mlx_optiq_ext import lora

    print(lora.table(lora.read_adapter(folder)))


def export(folder: Path) -> None:
    """Write PEFT's form of an adapter, or mlx-lm's, whichever is missing."""
    from mlx_optiq_ext import lora

    print(lora.convert(folder))


def start(running: Session, args: Any) -> None:
    """Merge the command line and the YAML file, and keep the options for the training.

    Args:
        running: The session of the command.
        args: All settings of the command. Our keys of the file are taken out.

    Raises:
        OptiqError: An option is unusable, or the processes were given different ones.
    """
    from mlx_optiq_ext import distributed

    from ..installation import gate

    own = read(Options, running.options or SimpleNamespace())
    options = _merged(_of_file(args), own)
    if not options.training:
        if running.options is not None:
            running.keep(Run(options))  # a plugin's options may choose ranks, which are saved too
        return
    gate().require("lora")
    distributed.size()  # from here on all processes fail together
    if not args.train:
        if own.training:
            raise InputError("--optiq-* options of mlx_lm.lora need --train")
    else:
        _check_training(options, args)
    given_too = {} if running.options is None else vars(running.options)
    running.options = SimpleNamespace(**{**given_too, **asdict(options)})
    distributed.agree(settings={**vars(args), **vars(running.options)})
    running.keep(Run(options))


def check_stock(args: Any) -> None:
    """Refuse a stock training that would continue from, or overwrite, ranks of our own.

    Args:
        args: Settings of the command; called from Python, some may be missing.
    """
    resume, folder = (getattr(args, each, None) for each in ("resume_adapter_file", "adapter_path"))
    lora_kind = getattr(args, "fine_tune_type", "lora") in ("lora", "dora")
    if not (getattr(args, "train", False) and lora_kind and folder):
        return
    from mlx_optiq_ext import lora

    parameters = getattr(args, "lora_parameters", None) or {}
    rank = parameters.get("rank") if isinstance(parameters, dict) else None
    lora.check_stock_training(None if resume is None else Path(resume), Path(folder), rank)


def keys_of_file(settings: Iterable[str]) -> list[str]:
    """Which settings of ``mlx_lm.lora`` are meant for us: keys of its YAML file.

    On the command line our options never reach mlx-lm's settings.
    """
    return [key for key in settings if key.startswith("optiq")]


def _of_file(args: Any) -> Options:
    """Our options of the YAML file, which are taken out of ``args``.

    Keys are spelled with underscores or, as the flags are, with hyphens.

    Raises:
        InputError: A key of the file is unknown or given twice, or its value is unknown.
    """
    from mlx_optiq_ext.lora import SCALINGS

    found: dict[str, Any] = {}
    allowed = {"rank_scaling": SCALINGS, "init": INITS, "no_compile": (True, False)}
    names: dict[str, str] = {}
    for key in keys_of_file(vars(args)):
        name, value = key.replace("-", "_").removeprefix("optiq_"), vars(args).pop(key)
        if name not in TRAINING:
            known = ", ".join(f"optiq_{each}" for each in TRAINING)
            raise InputError(f"{key} in the YAML file is not known: there are {known}")
        if name in names:
            raise InputError(f"{names[name]} and {key} in the YAML file are the same: keep one")
        names[name] = key
        if value is not None and value not in allowed.get(name, (value,)):
            choices = ", ".join(map(str, allowed[name]))
            raise InputError(f"{key}: {value!r} in the YAML file is none of {choices}")
        if value:
            found[name] = value
    return Options(**found)


def _merged(file: Options, own: Options) -> Options:
    """Options of the file, replaced by those of the command line."""
    return replace(file, **{name: getattr(own, name) for name in given(own)})


def _check_training(options: Options, args: Any) -> None:
    """Refuse options that a training cannot use."""
    from mlx_optiq_ext import distributed, lora

    if args.fine_tune_type not in ("lora", "dora"):
        raise InputError(
            f"--fine-tune-type {args.fine_tune_type} has no ranks: leave the --optiq-* options out"
        )
    if (options.init is None) != (options.original is None):
        raise InputError(
            "--optiq-init residual and --optiq-original MODEL belong together: the residual is "
            "what the original has and the quantized model lacks"
        )
    lora.check_parameters(args.lora_parameters)
    if args.batch_size % distributed.size():
        raise InputError(
            f"--batch-size {args.batch_size} does not divide over {distributed.size()} processes: "
            f"give a multiple of {distributed.size()}"
        )
    file = args.resume_adapter_file
    if distributed.leads() and file is not None and not Path(file).is_file():
        raise InputError(f"--resume-adapter-file {file}: no such file")


def request(options: Options, args: Any, training_data: Any) -> "Request":
    """The options as the library takes them.

    Args:
        options: Options of the command line and the file.
        args: All settings of the command.
        training_data: mlx-lm's data set.
    """
    from mlx_optiq_ext import lora

    original, resume = options.original, args.resume_adapter_file
    return lora.Request(
        model=args.model,
        folder=Path(args.adapter_path),
        original=None if original is None else lambda: _loaded(original),
        samples=lambda: lora.samples(training_data, args.max_seq_length),
        resume=None if resume is None else Path(resume),
        scaling=options.rank_scaling or lora.CONSTANT,
        compiled=not options.no_compile,
    )


def interrupted() -> str:
    """What an interrupted training leaves: checkpoints."""
    run = session.state(Run)
    if run is None or run.saved is None:
        return ": no checkpoint was written"
    return f": --resume-adapter-file {run.saved} goes on from the last checkpoint"


def _loaded(name: str) -> Any:
    from mlx_lm.utils import load

    return load(name, lazy=True)[0]
