"""``mlx_lm.models.cache``: lets plugins build the prompt cache."""

from . import session
from .patch import Patch, bind


def make_prompt_cache(wrapped, instance, args, kwargs):
    from . import plugin_manager

    hook = plugin_manager().hook.optiq_prompt_cache
    if not hook.get_hookimpls():
        return wrapped(*args, **kwargs)
    call, running = bind(wrapped, args, kwargs), session.current()
    caches = hook(
        model=call["model"],
        max_kv_size=call.get("max_kv_size"),
        options=running.options if running else None,
    )
    return wrapped(*args, **kwargs) if caches is None else caches


PATCHES = (
    Patch(
        "mlx_lm.models.cache:make_prompt_cache",
        feature="plugins",
        why="asks plugins for the per-layer caches",
        upstream="mlx-lm #1578 (plugin registration)",
        wrapper=make_prompt_cache,
    ),
)
