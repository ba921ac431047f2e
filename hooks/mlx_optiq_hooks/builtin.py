"""Our own hookimpls: this package is its own first plugin."""

from mlx_optiq_ext.plugins import hookimpl

from .commands import convert, kv
from .commands.table import COMMANDS
from .engine import session


@hookimpl
def optiq_add_arguments(command, group):
    COMMANDS[command].add_arguments(group)


@hookimpl
def optiq_check_options(command, options, args):
    return COMMANDS[command].check(command, options, args)


@hookimpl
def optiq_quant_predicate():
    run = session.state(convert.Run)
    return None if run is None or run.conversion is None else run.conversion.plan.predicate()


@hookimpl
def optiq_prompt_cache(model, max_kv_size):
    if not kv.mounted(model):
        return None
    from mlx_optiq_ext.kv import make_caches

    return make_caches(model, max_kv_size)
