"""``mlx_lm.generate``: each row of a batch generator keeps the adapter it was inserted with."""

import sys
from contextvars import ContextVar
from typing import TYPE_CHECKING

from ..engine.patch import Patch, of

if TYPE_CHECKING:
    from mlx_optiq_ext.adapters import Routes

_NAME = "_optiq_routes"

#: The routes of the generator that runs, for its batches, which only know the uids of their rows.
_running: ContextVar["Routes | None"] = ContextVar("mlx_optiq_routes", default=None)


def insert_segments(wrapped, instance, args, kwargs):
    uids = wrapped(*args, **kwargs)
    if "mlx_optiq_ext.adapters" not in sys.modules:
        return uids  # unused: nothing is imported for it
    from mlx_optiq_ext.adapters import Routes, active, mounts_on

    mounts = mounts_on(instance.model)
    if mounts is not None:
        routes = instance.__dict__.setdefault(_NAME, Routes(mounts))
        adapter = mounts.resolve(active())
        if adapter is not None:
            routes.add(uids, adapter)
    return uids


def advance(wrapped, instance, args, kwargs):
    routes = instance.__dict__.get(_NAME)
    if routes is None:
        return wrapped(*args, **kwargs)
    token = _running.set(routes)
    try:
        prompts, generated = wrapped(*args, **kwargs)
    finally:
        _running.reset(token)
    finished = [each for each in generated if each.finish_reason is not None]
    for each in finished:
        each.prompt_cache = routes.signed(each.uid, each.prompt_cache)
    routes.drop([each.uid for each in finished])
    return prompts, generated


def extract_cache(wrapped, instance, args, kwargs):
    found = wrapped(*args, **kwargs)
    routes = instance.__dict__.get(_NAME)
    if routes is None:
        return found
    return {uid: (routes.signed(uid, cache), tokens) for uid, (cache, tokens) in found.items()}


def remove(wrapped, instance, args, kwargs):
    result = wrapped(*args, **kwargs)
    routes = instance.__dict__.get(_NAME)
    if routes is not None:
        routes.drop(args[0] if args else kwargs["uids"])
    return result


def run_batch(wrapped, instance, args, kwargs):
    routes = _running.get()
    if routes is None:
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext.adapters import AdapterActivation

    with AdapterActivation(routes.selection(instance.uids)):
        return wrapped(*args, **kwargs)


_UPSTREAM = "none: one adapter for a loaded model (server.py)"

RESPONSE = ("finish_reason", "prompt_cache", "uid")

PATCHES = (
    Patch(
        "mlx_lm.generate:BatchGenerator.insert_segments",
        feature="adapters_batched",
        why="notes the adapter that is active while a row is inserted",
        upstream=_UPSTREAM,
        wrapper=insert_segments,
        uses=of("mlx_lm.generate", "BatchGenerator.model"),
    ),
    Patch(
        "mlx_lm.generate:BatchGenerator._next",
        feature="adapters_batched",
        why="tells the batches whose rows they hold, and lets adapters of finished rows go",
        upstream=_UPSTREAM,
        wrapper=advance,
        uses=of("mlx_lm.generate", *(f"GenerationBatch.Response.{name}" for name in RESPONSE)),
    ),
    Patch(
        "mlx_lm.generate:BatchGenerator.extract_cache",
        feature="adapters_batched",
        why="says which adapter a prompt cache was made with",
        upstream=_UPSTREAM,
        wrapper=extract_cache,
    ),
    Patch(
        "mlx_lm.generate:BatchGenerator.remove",
        feature="adapters_batched",
        why="lets adapters of cancelled rows go",
        upstream=_UPSTREAM,
        wrapper=remove,
    ),
    Patch(
        "mlx_lm.generate:PromptProcessingBatch.prompt",
        feature="adapters_batched",
        why="gives each prompt its adapter",
        upstream=_UPSTREAM,
        wrapper=run_batch,
        uses=of("mlx_lm.generate", "PromptProcessingBatch.uids"),
    ),
    Patch(
        "mlx_lm.generate:GenerationBatch._step",
        feature="adapters_batched",
        why="gives each row its adapter, in the order of the batch's uids",
        upstream=_UPSTREAM,
        wrapper=run_batch,
        uses=of("mlx_lm.generate", "GenerationBatch.uids"),
    ),
)
