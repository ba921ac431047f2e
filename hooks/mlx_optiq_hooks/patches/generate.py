"""``mlx_lm.generate``: adapters of a batch's rows, and prompts from disk.

Each row of a batch generator keeps the adapter it was inserted with.
"""

import sys
from contextvars import ContextVar
from typing import TYPE_CHECKING

from ..commands.prompts import Run, alone
from ..engine import session
from ..engine.patch import Patch, bind, of

if TYPE_CHECKING:
    from mlx_optiq_ext.adapters import Routes

_NAME = "_optiq_routes"

#: Routes of the running generator, for its batches: they only know the uids of their rows.
_running: ContextVar["Routes | None"] = ContextVar("mlx_optiq_routes", default=None)


def insert_segments(wrapped, instance, args, kwargs):
    uids = wrapped(*args, **kwargs)
    if "mlx_optiq_ext.adapters" not in sys.modules:
        return uids  # no adapters are in use: import nothing
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


def generate_step(wrapped, instance, args, kwargs):
    run, running = session.state(Run), session.current()
    if run is None or running is None:
        return wrapped(*args, **kwargs)
    call = bind(wrapped, args, kwargs)
    if call.get("input_embeddings") is not None:
        return wrapped(*args, **kwargs)
    if running.command == "server":
        return _served_alone(wrapped, call)
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    def make():
        return make_prompt_cache(call["model"], run.max_kv_size)

    caches = call.get("prompt_cache")
    caches = make() if caches is None else caches

    def generated(rest):
        return wrapped(**{**call, "prompt": mx.array(rest), "prompt_cache": caches})

    space = run.space((*run.source, None), make)
    prompt, step = call["prompt"].tolist(), call.get("prefill_step_size", _STEP)
    return run.sequences.run(space, prompt, caches, generated, call["model"], step)


def _served_alone(wrapped, call):
    request = alone.get()
    # What processes logits is to see all tokens that are computed.
    if request is None or request.prompt is None or call.get("logits_processors"):
        return wrapped(**call)
    import mlx.core as mx

    from mlx_optiq_ext.prompts import prefill

    tokens, caches = request.prompt, call["prompt_cache"]
    start, told = len(tokens) - call["prompt"].size, call["prompt_progress_callback"]
    total = call["prompt"].size

    def keep(held):
        told(len(held) - start, total)
        request.keep(held, caches)

    def generated():
        step = call.get("prefill_step_size", _STEP)
        known = prefill(call["model"], tokens, start, caches, keep, request.enders, step)
        yield from wrapped(
            **{
                **call,
                "prompt": mx.array(tokens[known:]),
                "prompt_progress_callback": lambda done, _: told(known - start + done, total),
            }
        )

    return generated()


def stream_generate(wrapped, instance, args, kwargs):
    run = session.state(Run)
    if run is not None:
        call = bind(wrapped, args, kwargs)
        run.sequences.enders = getattr(call["tokenizer"], "eos_token_ids", ())
    return wrapped(*args, **kwargs)


#: Tokens that mlx-lm computes at a time.
_STEP = 2048

RESPONSE = ("finish_reason", "prompt_cache", "uid")


def _patch(attribute: str, wrapper, why: str, *uses: str) -> Patch:
    return Patch(
        f"mlx_lm.generate:{attribute}",
        feature="adapters_batched",
        why=why,
        upstream="none: one adapter for a loaded model (server.py)",
        wrapper=wrapper,
        uses=of("mlx_lm.generate", *uses),
    )


PATCHES = (
    _patch(
        "BatchGenerator.insert_segments",
        insert_segments,
        "notes the adapter that is active while a row is inserted",
        "BatchGenerator.model",
    ),
    _patch(
        "BatchGenerator._next",
        advance,
        "gives the batches their routes, and releases the adapters of finished rows",
        *(f"GenerationBatch.Response.{name}" for name in RESPONSE),
    ),
    _patch(
        "BatchGenerator.extract_cache",
        extract_cache,
        "marks a prompt cache with the adapter that made it",
    ),
    _patch("BatchGenerator.remove", remove, "releases the adapters of cancelled rows"),
    _patch(
        "PromptProcessingBatch.prompt",
        run_batch,
        "gives each prompt its adapter",
        "PromptProcessingBatch.uids",
    ),
    _patch(
        "GenerationBatch._step",
        run_batch,
        "gives each row its adapter, in the order of the batch's uids",
        "GenerationBatch.uids",
    ),
    Patch(
        "mlx_lm.generate:generate_step",
        feature="prompts",
        why="takes the beginning of a prompt from disk",
        upstream="none: a saved prompt cache is named by hand (--prompt-cache-file)",
        wrapper=generate_step,
    ),
    Patch(
        "mlx_lm.generate:stream_generate",
        feature="prompts",
        why="knows the tokens that end a message",
        upstream="none: generate_step gets no tokenizer",
        wrapper=stream_generate,
    ),
)
