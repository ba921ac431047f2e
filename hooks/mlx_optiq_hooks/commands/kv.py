"""``--optiq-kv`` of the commands that run a model.

It is the only option of ``mlx_lm.perplexity``; the others have more.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_optiq_ext.errors import InputError

from ..engine import session
from ..engine.options import read
from . import distributed as processes

if TYPE_CHECKING:
    from mlx_optiq_ext.kv import KVPlan


@dataclass(frozen=True)
class Options:
    """``--optiq-kv`` as it was written, or None."""

    kv: str | None = None


@dataclass
class Run:
    """State of a command that was given a KV plan.

    Attributes:
        plan: The precision of each layer's keys and values.
        mounted: Whether a model has the plan already. The first model that a command runs gets it.
    """

    plan: "KVPlan"
    mounted: bool = False


def add_arguments(group):
    """Add the option to an argparse group."""
    group.add_argument(
        "--optiq-kv",
        metavar="PLAN",
        help="Keep each layer's keys and values at their own precision: a kv_config.json, 'auto' "
        "for the one beside the model, or a width for all such as 4, k8v4 or k8v4g32.",
    )


def check(command, parsed, args) -> None:
    """Refuse an unusable plan; keep a usable one for the running command."""
    from ..installation import attention_backends, gate, register_kv_formats

    options = read(Options, parsed)
    if options.kv is not None:
        gate().require("kv")
        register_kv_formats()
        attention_backends()  # a plugin that fails there is refused before a model is loaded
        if getattr(args, "kv_bits", None) is not None:
            raise InputError(
                "--optiq-kv and --kv-bits both decide how to keep keys and values: leave one out"
            )
        from mlx_optiq_ext import kv
        from mlx_optiq_ext.model.source import check_source

        model = getattr(args, "model", None)
        plan = kv.find_plan(options.kv, model)
        if model is not None and Path(model).exists():
            check_source(model)
        session.keep(Run(plan))
        running = session.running()
        if running is not None:
            running.facts["KV plan (kv_config.json)"] = kv.plan_digest(plan)
    processes.check(command)


def plan() -> "KVPlan | None":
    """The KV plan that the running command was given, or None."""
    run = session.state(Run)
    return None if run is None else run.plan


def mounted(model: Any) -> bool:
    """Whether a model has a KV plan; the first model that a command runs is given its plan."""
    run = session.state(Run)
    if run is None and "mlx_optiq_ext.kv" not in sys.modules:
        return False  # unused: nothing is imported for it
    from mlx_optiq_ext import kv

    if kv.mounted_on(model) is not None:
        return True
    if run is None or run.mounted:
        return False  # such as a draft model
    mount(model, run)
    return True


def mount(model: Any, run: Run) -> None:
    """Give a model the KV plan of the running command."""
    from mlx_optiq_ext import kv

    from ..installation import gate

    kv.mount(model, run.plan, mergeable=gate().state("kv_batched").on)
    run.mounted = True
