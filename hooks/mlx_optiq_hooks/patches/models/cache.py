"""``mlx_lm.models.cache``: plugins build prompt caches, and saved ones may be packed."""

import sys
from pathlib import Path

from ...commands import kv
from ...engine import session
from ...engine.patch import Patch, bind, of


def make_prompt_cache(wrapped, instance, args, kwargs):
    from ...installation import plugin_manager

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


def load_prompt_cache(wrapped, instance, args, kwargs):
    from mlx_optiq_ext.kv import PackedKVCache, saved

    from ...installation import register_kv_formats

    register_kv_formats()
    # mlx-lm looks the classes in a file up by name in its own module.
    sys.modules["mlx_lm.models.cache"].__dict__.setdefault("PackedKVCache", PackedKVCache)
    path = Path(bind(wrapped, args, kwargs)["file_name"])
    result, plan = saved.load(lambda: wrapped(*args, **kwargs), path), kv.plan()
    # With return_metadata the result is a pair.
    caches = result[0] if isinstance(result, tuple) else result
    if plan is not None:
        saved.check_plan(caches, plan, path)
    return result


#: What `kv.PackedKVCache` uses of mlx-lm's caches, for one sequence and for a batch.
CACHES = of(
    "mlx_lm.models.cache",
    "globals",
    "CacheList.caches",
    "_BaseCache.from_state",
    *(
        f"{kind}.{name}"
        for kind in ("KVCache", "RotatingKVCache")
        for name in (
            *("keys", "values", "offset", "state", "update_and_fetch", "make_mask"),
            *("is_trimmable", "trim", "size", "merge"),
        )
    ),
    *(f"RotatingKVCache.{name}" for name in ("keep", "max_size", "_idx")),
    *(
        f"{kind}.{name}"
        for kind in ("BatchKVCache", "BatchRotatingKVCache")
        for name in (
            *("keys", "values", "offset", "state", "left_padding", "_idx"),
            *("extend", "extract", "filter", "finalize", "merge", "prepare"),
        )
    ),
    *(f"ChunkedKVCache.{n}" for n in ("chunk_size", "start_position", "maybe_trim_front")),
)

PATCHES = (
    Patch(
        "mlx_lm.models.cache:make_prompt_cache",
        feature="plugins",
        why="asks plugins for the per-layer caches",
        upstream="mlx-lm #1578 (plugin registration)",
        wrapper=make_prompt_cache,
    ),
    Patch(
        "mlx_lm.models.cache:load_prompt_cache",
        feature="kv",
        why="reads saved prompt caches with packed layers",
        upstream="none: cache classes are looked up in globals() (cache.py)",
        wrapper=load_prompt_cache,
        uses=CACHES,
    ),
)
