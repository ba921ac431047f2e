"""Our own hookimpls: this package is its own first plugin."""

from typing import Any

from mlx_optiq_ext.plugins import hookimpl

from .commands import (
    benchmark as latency_options,
)
from .commands import (
    convert as convert_options,
)
from .commands import (
    convert_yolo as yolo_options,
)
from .commands import (
    distributed as rank_options,
)
from .commands import (
    evaluate as evaluate_options,
)
from .commands import (
    kv as kv_options,
)
from .commands import (
    lora as lora_options,
)
from .commands import (
    server as adapter_options,
)
from .engine import session

_OPTIONS: dict[str, tuple[Any, ...]] = {
    "convert": (convert_options, yolo_options),
    "lora": (lora_options,),
    **dict.fromkeys(kv_options.COMMANDS, (kv_options,)),
    "server": (kv_options, adapter_options),
    "benchmark": (kv_options, latency_options),
    "evaluate": (kv_options, evaluate_options),
}


@hookimpl
def optiq_add_arguments(command, group):
    for options in _OPTIONS.get(command, ()):
        options.add_arguments(group)


@hookimpl
def optiq_check_options(command, options, args):
    instead = [part.check(options, args) for part in _OPTIONS.get(command, ())]
    rank_options.check(command, options, args)
    return next((run for run in instead if run is not None), None)


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
