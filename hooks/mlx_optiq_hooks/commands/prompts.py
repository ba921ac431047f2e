"""``--optiq-prompt-cache`` of the commands that answer prompts."""

import re
from collections.abc import Callable, Collection
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_optiq_ext.errors import InputError, UnsupportedError

from ..engine import session
from ..engine.options import given, read
from . import kv

if TYPE_CHECKING:
    from mlx_optiq_ext.prompts import Sequences, Space, StoredPrompts

#: Bytes of the folder where no size is given.
SIZE = "20GB"

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Options:
    """Options of the command line, or None."""

    prompt_cache: Path | None = None
    prompt_cache_size: str | None = None


@dataclass(frozen=True)
class Run:
    """State of a command with a prompt cache on disk.

    Attributes:
        stored: The prompts.
        sequences: The same, for commands that run one sequence at a time.
        source: The model and its adapter, as the command line names them.
        max_kv_size: Its ``--max-kv-size``, or None.
    """

    stored: "StoredPrompts"
    sequences: "Sequences"
    source: tuple[str | None, str | None]
    max_kv_size: int | None = None
    _digests: dict[Any, str] = field(default_factory=dict)
    _divides: dict[Any, bool] = field(default_factory=dict)
    _spaces: dict[Any, "Space"] = field(default_factory=dict)

    def space(
        self,
        key: tuple[Any, ...],
        make: Callable[[], list[Any]],
        adapters: tuple[tuple[str, float], ...] = (),
    ) -> "Space":
        """The space of a loaded model.

        Args:
            key: Its folder or name, its ``--adapter-path``, its draft model.
            make: Makes its caches.
            adapters: Digest and scale of each mounted adapter in use.
        """
        from mlx_optiq_ext.prompts import space_of

        known = (key, adapters)
        if known not in self._spaces:
            self._spaces[known] = space_of(make, self.digest(key), adapters)
        return self._spaces[known]

    def divides(self, key: tuple[Any, ...], make: Callable[[], list[Any]]) -> bool:
        """Whether prompts of a loaded model are computed in parts; all processes must ask first."""
        from mlx_optiq_ext.prompts import divides

        if key not in self._divides:
            self._divides[key] = divides(make())
        return self._divides[key]

    def digest(self, key: tuple[Any, ...]) -> str:
        """Digest of a model's files, with those of its adapter and its draft model."""
        from mlx_optiq_ext.lora.forms import location
        from mlx_optiq_ext.model.hub import cached_folder
        from mlx_optiq_ext.model.loading import model_digest

        if key not in self._digests:
            model, adapter, draft = key
            parts = [model_digest(cached_folder(model))]
            parts.append("" if adapter is None else location.digest(adapter))
            parts.append("" if draft is None else model_digest(cached_folder(draft)))
            self._digests[key] = " ".join(parts)
        return self._digests[key]


@dataclass
class Alone:
    """The request that a server answers alone.

    Attributes:
        keep: Keeps caches that hold the first tokens of its prompt.
        enders: Tokens that end a message.
        prompt: Its tokens; None until they are known.
    """

    keep: Callable[[list[int], list[Any]], None]
    enders: Collection[int]
    prompt: list[int] | None = None


#: Set in the thread that generates.
alone: ContextVar[Alone | None] = ContextVar("mlx_optiq_ext_alone", default=None)


def add_arguments(group) -> None:
    """Add the options to an argparse group."""
    group.add_argument(
        "--optiq-prompt-cache",
        metavar="DIR",
        type=Path,
        help="Keep computed prompts in this folder, in blocks that prompts with the same beginning "
        "share, so that they are not computed again after a restart.",
    )
    group.add_argument(
        "--optiq-prompt-cache-size",
        metavar="SIZE",
        help=f"Bytes that the folder may take, such as 500MB (default: {SIZE}); what was used "
        "least recently makes room.",
    )


def add_with_kv(group) -> None:
    """Add the options beside ``--optiq-kv``."""
    kv.add_arguments(group)
    add_arguments(group)


def check_with_kv(command, parsed, args) -> None:
    """Check the options and ``--optiq-kv``."""
    kv.check(command, parsed, args)
    check(command, parsed, args)


def check(command, parsed, args) -> None:
    """Refuse unusable options; open the folder for the running command."""
    from ..installation import gate

    options = read(Options, parsed)
    if not given(options):
        return
    gate().require("prompts")
    if options.prompt_cache is None:
        raise InputError("--optiq-prompt-cache-size needs --optiq-prompt-cache DIR")
    limit = _bytes(options.prompt_cache_size or SIZE)
    if getattr(args, "kv_bits", None) is not None:
        raise UnsupportedError(
            "--optiq-prompt-cache does not keep what --kv-bits quantizes: use --optiq-kv instead"
        )
    if command != "server":
        if getattr(args, "draft_model", None) is not None:
            raise UnsupportedError(
                "--optiq-prompt-cache with --draft-model works in mlx_lm.server only: leave one out"
            )
        if command == "generate" and getattr(args, "prompt_cache_file", None) is not None:
            raise InputError(
                "--optiq-prompt-cache and --prompt-cache-file both say where a prompt comes from: "
                "leave one out"
            )
    from mlx_optiq_ext import prompts

    stored = prompts.StoredPrompts(prompts.BlockStore.open(options.prompt_cache, limit))
    source = getattr(args, "model", None), getattr(args, "adapter_path", None)
    size = getattr(args, "max_kv_size", None)
    session.keep(Run(stored, prompts.Sequences(stored), source, size))


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?) ?([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size < 1:
        raise InputError(f"--optiq-prompt-cache-size {text}: not a size such as 20GB or 500MB")
    return size
