"""``mlx_lm.server``: keys and limits, for whichever of our server options were given."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_optiq_ext.errors import InputError

from ..engine import session

if TYPE_CHECKING:
    from mlx_optiq_ext.serving import Guard, Metrics

#: Title of a group in the help -> its options.
GROUPS = {
    "keys and limits": ("api_key", "max_connections", "max_body", "client_timeout", "metrics"),
}
#: Gives the key where the command line does not.
KEY_VARIABLE = "MLX_OPTIQ_EXT_API_KEY"


@dataclass(frozen=True)
class Options:
    """Options of the command line; None or empty if they were not given."""

    api_key: Sequence[str] = ()
    max_connections: int | None = None
    max_body: int | None = None
    client_timeout: float | None = None
    metrics: bool = False


@dataclass(frozen=True)
class Guarded:
    """State of a server that was given one of our server options.

    Attributes:
        guard: Its rules.
        base: The model's folder or name.
        adapter_path: The adapter that ``--adapter-path`` names, or None.
        metrics: What is counted; None if nothing is.
    """

    guard: "Guard"
    base: str
    adapter_path: str | None
    metrics: "Metrics | None" = None


def add_arguments(group) -> None:
    """Add the options to an argparse group."""
    group.add_argument(
        "--optiq-api-key",
        metavar="KEY",
        action="append",
        help="Ask every request but /health for this key, as Authorization: Bearer KEY. May be "
        f"given many times; @FILE reads one key a line. {KEY_VARIABLE} gives one, too.",
    )
    group.add_argument(
        "--optiq-max-connections",
        metavar="N",
        type=int,
        help="Serve at most so many connections at a time (default: 256).",
    )
    group.add_argument(
        "--optiq-max-body",
        metavar="BYTES",
        type=int,
        help="Refuse requests with a larger body (default: 33554432).",
    )
    group.add_argument(
        "--optiq-client-timeout",
        metavar="SECONDS",
        type=float,
        help="End connections that take longer to send a request, or to accept a piece of an "
        "answer (default: 60).",
    )
    group.add_argument(
        "--optiq-metrics",
        action="store_const",
        const=True,
        help="Count requests, tokens and times, and show them at /metrics in Prometheus' format.",
    )


def say(line: str) -> None:
    """Say at start what is on; one of several processes does."""
    from mlx_optiq_ext import distributed

    if distributed.rank() == 0:
        print(f"mlx_lm.server: {line}", file=sys.stderr)


def keep_guard(options: Options, args, *, adapters: bool = False) -> None:
    """Check the options and keep the rules of the server that starts.

    Args:
        options: The options.
        args: The stock command's.
        adapters: Whether adapters are served, whose names are not for every web page.

    Raises:
        OptiqError: An option is not usable.
    """
    from mlx_optiq_ext.serving import (
        Guard,
        Keys,
        Limits,
        Metrics,
        described,
        known_origins,
        warning,
    )

    from ..installation import gate

    gate().require("serving")
    if args.model is None:
        raise InputError("with --optiq-* options the server needs its model: name it with --model")
    for name, value in (
        ("--optiq-max-connections", options.max_connections),
        ("--optiq-max-body", options.max_body),
        ("--optiq-client-timeout", options.client_timeout),
    ):
        # Not "<= 0", which NaN is not either.
        if value is not None and not 0 < value < 2**40:
            raise InputError(f"{name} must be more than 0")
    usual = Limits()
    keys = Keys.read(options.api_key) if options.api_key else None
    guard = Guard(
        host=args.host,
        origins=known_origins(getattr(args, "allowed_origins", "*")),
        keys=keys,
        own_pages=adapters and keys is None and not _origins_given(sys.argv[1:]),
        limits=Limits(
            options.max_connections or usual.connections,
            options.max_body or usual.body,
            options.client_timeout or usual.patience,
        ),
    )
    if said := warning(guard):
        print(f"mlx_lm.server: warning: {said}", file=sys.stderr)
    for line in described(guard, args.port, metrics=options.metrics):
        say(line)
    metrics = Metrics() if options.metrics else None
    session.keep(Guarded(guard, args.model, args.adapter_path, metrics))


def _origins_given(words: Sequence[str]) -> bool:
    """Whether a command line has mlx-lm's ``--allowed-origins``, also shortened."""
    # Its value does not tell: the default is what "*" gives, too.
    names = (word.partition("=")[0] for word in words)
    return any(len(n) > 3 and "--allowed-origins".startswith(n) for n in names)
