"""``mlx_lm.server``: the KV plan of the served model."""

from . import kv_options, session
from .patch import Patch


def load(wrapped, instance, args, kwargs):
    result = wrapped(*args, **kwargs)
    running, model = session.current(), instance.model
    if running is None or session.kv_plan(running) is None or model is None:
        return result
    from mlx_optiq_ext import kv

    if kv.mounted_on(model) is None:
        kv_options.mount(model, running)
    mounted = kv.mounted_on(model)
    if mounted is not None:
        # A CacheList says that it merges, whatever is in it.
        instance.is_batchable = instance.is_batchable and mounted.mergeable
    return result


PATCHES = (
    Patch(
        "mlx_lm.server:ModelProvider.load",
        feature="kv",
        why="gives the served model its KV plan",
        upstream="none: --kv-bits is one width, sequential only (server.py)",
        wrapper=load,
    ),
)
