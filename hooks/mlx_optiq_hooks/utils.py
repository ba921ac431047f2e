"""``mlx_lm.utils``: the predicate that quantizes by plan."""

from . import session
from .patch import Patch, bind


def quantize_model(wrapped, instance, args, kwargs):
    running = session.current()
    if running is None:
        return wrapped(*args, **kwargs)
    from . import plugin_manager

    call = bind(wrapped, args, kwargs)
    if call.get("quant_predicate") is None:
        predicate = plugin_manager().hook.optiq_quant_predicate(
            model=call["model"], config=call["config"], options=running.options
        )
        if predicate is not None:
            call["quant_predicate"] = predicate
    return wrapped(**call)


PATCHES = (
    Patch(
        "mlx_lm.utils:quantize_model",
        feature="weights",
        why="hands the plan over as quant_predicate, by name",
        upstream="none: no stock command takes a predicate by flag",
        wrapper=quantize_model,
    ),
)
