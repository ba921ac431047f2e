"""Our own hookimpls: this package is its own first plugin."""

from mlx_optiq_ext.plugins import hookimpl

from . import convert_options, kv_options, session

_OPTIONS = {"convert": convert_options, **dict.fromkeys(kv_options.COMMANDS, kv_options)}


@hookimpl
def optiq_add_arguments(command, group):
    if command in _OPTIONS:
        _OPTIONS[command].add_arguments(group)


@hookimpl
def optiq_check_options(command, options, args):
    if command in _OPTIONS:
        _OPTIONS[command].check(options, args)


@hookimpl
def optiq_sensitivity_methods():
    from mlx_optiq_ext.weights import METHODS

    return dict(METHODS)


@hookimpl
def optiq_quant_predicate(model, config, options):
    running = session.current()
    conversion = running.results.get("conversion") if running else None
    return conversion.plan.predicate() if conversion else None


@hookimpl
def optiq_prompt_cache(model, max_kv_size):
    if not kv_options.mounted(model):
        return None
    from mlx_optiq_ext import kv

    return kv.make_caches(model, max_kv_size)
