"""``mlx_lm.server``: ``--optiq-kv``, and adapters beside the base model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_optiq_ext.errors import InputError, UnsupportedError

from ..engine import session
from ..engine.options import given, read
from . import kv, prompts, serving

if TYPE_CHECKING:
    from mlx_optiq_ext.adapters import Catalogue

#: Title of a group in the help -> its options.
GROUPS = {
    "adapters": (
        "adapter",
        "max_adapters",
        "max_adapter_rank",
        "max_adapter_bytes",
        "allow_adapter_updates",
        "adapter_dir",
    ),
}


@dataclass(frozen=True)
class Options:
    """Options of the command line; None, False or empty if they were not given."""

    adapter: Sequence[str] = ()
    max_adapters: int | None = None
    max_adapter_rank: int | None = None
    max_adapter_bytes: int | None = None
    allow_adapter_updates: bool = False
    adapter_dir: Path | None = None


@dataclass(frozen=True)
class Serving:
    """State of a server that serves adapters.

    Attributes:
        base: The base model's folder or name.
        catalogue: The adapters.
        updates: The folder that clients may load adapters from; None if they may load none.
    """

    base: str
    catalogue: "Catalogue"
    updates: Path | None = None


# While the server loads a model: its --adapter-path, in a tuple. None elsewhere.
_loading: ContextVar[tuple[str | None] | None] = ContextVar("mlx_optiq_ext_loading", default=None)


@contextmanager
def loading(adapter_path: str | None) -> Iterator[None]:
    """Say that the server loads a model, and which adapter its ``--adapter-path`` names."""
    token = _loading.set((adapter_path,))
    try:
        yield
    finally:
        _loading.reset(token)


def by_client(adapter_path: str) -> bool:
    """Whether a request to the server named an adapter that its ``--adapter-path`` does not."""
    own = _loading.get()
    return own is not None and adapter_path != own[0]


def add_arguments(group):
    """Add the options to an argparse group."""
    kv.add_arguments(group)
    group.add_argument(
        "--optiq-adapter",
        metavar="NAME=PATH_OR_REPO",
        action="append",
        help="Serve a LoRA adapter beside the base model; requests pick it by its name as their "
        "model. May be given many times.",
    )
    group.add_argument(
        "--optiq-max-adapters",
        metavar="N",
        type=int,
        help="Mount at most so many adapters at a time; idle ones make room. Default: all.",
    )
    group.add_argument(
        "--optiq-max-adapter-rank",
        metavar="RANK",
        type=int,
        help="Refuse adapters of a higher LoRA rank. Default: 256.",
    )
    group.add_argument(
        "--optiq-max-adapter-bytes",
        metavar="BYTES",
        type=int,
        help="Refuse adapters whose weights are larger. Default: any size.",
    )
    group.add_argument(
        "--optiq-allow-adapter-updates",
        action="store_const",
        const=True,
        help="Let clients load and unload adapters at /v1/load_lora_adapter and "
        "/v1/unload_lora_adapter.",
    )
    group.add_argument(
        "--optiq-adapter-dir",
        metavar="DIR",
        type=Path,
        help="The folder that clients may load adapters from.",
    )
    serving.add_arguments(group)
    prompts.add_arguments(group)


def check(command, parsed, args) -> None:
    """Refuse unusable options, and find the adapters."""
    from mlx_optiq_ext import distributed

    kv.check(command, parsed, args)
    if (plan := kv.plan()) is not None:
        where = "every layer" if plan.everywhere else f"{len(plan.layers)} layers"
        serving.say(f"KV cache: {plan.bits_per_element:.2f} bits per element in {where}")
    options, rules = read(Options, parsed), read(serving.Options, parsed)
    if given(options):
        _check_adapters(options, args)
    if given(options) or given(rules):
        serving.keep_guard(rules, args, adapters=bool(given(options)))
    if distributed.size() > 1:
        _check_processes(options, args)
    prompts.check(command, parsed, args)
    if given(options):
        _keep_adapters(options, args.model)


def _check_adapters(options: Options, args) -> None:
    from ..installation import gate

    gate().require("adapters")
    if args.model is None:
        raise InputError("--optiq-adapter needs the base model: name it with --model")
    if args.adapter_path is not None:
        raise InputError(
            "--adapter-path changes the base model that --optiq-adapter builds on: give that "
            "adapter a name with --optiq-adapter too"
        )
    if options.allow_adapter_updates is not (options.adapter_dir is not None):
        raise InputError(
            "--optiq-allow-adapter-updates and --optiq-adapter-dir go together: clients load "
            "adapters from that folder only"
        )
    if options.adapter_dir is not None and not options.adapter_dir.is_dir():
        raise InputError(f"--optiq-adapter-dir {options.adapter_dir}: no such folder")
    for name in ("max_adapters", "max_adapter_rank", "max_adapter_bytes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--optiq-{name.replace('_', '-')} must be 1 or more")


def _check_processes(options: Options, args) -> None:
    """Refuse options that work in one process only."""
    if args.draft_model is not None:
        raise UnsupportedError("mlx-lm takes no --draft-model in several processes: leave it out")
    if args.adapter_path is not None:
        raise UnsupportedError(
            "mlx-lm takes no --adapter-path in several processes: serve it with --optiq-adapter "
            "NAME=PATH_OR_REPO"
        )
    if options.allow_adapter_updates:
        raise UnsupportedError(
            "--optiq-allow-adapter-updates works in one process only: name every adapter with "
            "--optiq-adapter when the server starts"
        )
    if options.max_adapters is not None and options.max_adapters < len(options.adapter):
        raise UnsupportedError(
            f"--optiq-max-adapters {options.max_adapters} would mount adapters while the server "
            "runs, which works in one process only: leave it out"
        )


def _keep_adapters(options: Options, base: str) -> None:
    """Find the adapters; repositories are downloaded here, before the server starts."""
    from mlx_optiq_ext import distributed
    from mlx_optiq_ext.adapters import Caps, Catalogue, read_offers
    from mlx_optiq_ext.lora.forms.location import digest

    offers = read_offers(options.adapter, base, _resolved)
    caps = Caps(options.max_adapter_rank or Caps.rank, options.max_adapter_bytes)
    catalogue = Catalogue(offers, limit=options.max_adapters, caps=caps)
    session.keep(Serving(base, catalogue, options.adapter_dir))
    serving.say(
        f"adapters: {', '.join(each.name for each in offers) or 'none yet'}; at most "
        f"{options.max_adapters or 'all'} mounted, of rank {caps.rank} or less"
    )
    if options.adapter_dir is not None:
        serving.say(f"clients may load adapters from {options.adapter_dir}")
    running = session.running()
    if running is not None and distributed.size() > 1:
        running.facts |= {f"files of adapter {each.name}": digest(each.folder) for each in offers}


def _resolved(source: str) -> str | Path:
    """The folder that a plugin gives for an adapter's name, or the name itself."""
    from ..installation import plugin_manager

    found = plugin_manager().hook.optiq_resolve_adapter(name=source)
    return source if found is None else found
