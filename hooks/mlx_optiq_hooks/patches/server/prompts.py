"""``mlx_lm.server``: prompts on disk behind its prompt cache.

The table stands behind that of the adapters, so that this wrapper is the outer one: it gets the
cache first, and the adapters' keys reach it.
"""

import copy

from ...commands.prompts import Alone, Run, alone
from ...engine import session
from ...engine.patch import Patch, bind, of
from . import model as server


@server.ending
def load(wrapped, instance, args, kwargs):
    result, run = wrapped(*args, **kwargs), session.state(Run)
    if run is not None and instance.model_key is not None:
        from mlx_lm.models.cache import make_prompt_cache

        # Now, and not while a request waits.
        run.digest(instance.model_key)
        # All processes load a model at the same time; in older releases only one tokenizes.
        run.divides(instance.model_key, lambda: make_prompt_cache(instance.model))
    return result


def __init__(wrapped, instance, args, kwargs):
    run = session.state(Run)
    if run is None:
        return wrapped(*args, **kwargs)
    from mlx_lm.models.cache import make_prompt_cache

    from mlx_optiq_ext.prompts import TieredPromptCache

    call = bind(wrapped, args, kwargs)
    provider = call["model_provider"]

    def make():
        caches = make_prompt_cache(provider.model)
        if provider.draft_model is not None:
            caches += make_prompt_cache(provider.draft_model)
        return caches

    def space(key):
        # With adapters: the model's key, and name, version and scale of each.
        key, adapters = key if isinstance(key[0], tuple) else (key, ())
        return run.space(key, make, tuple((version, scale) for _, version, scale in adapters))

    call["prompt_cache"] = TieredPromptCache(call["prompt_cache"], run.stored, space)
    return wrapped(**call)


def _tokenize(wrapped, instance, args, kwargs):
    result, run = wrapped(*args, **kwargs), session.state(Run)
    if run is None or result[-1] is not None:  # a prompt with images is one part
        return result
    request = alone.get()
    if request is not None:
        request.prompt = list(result[0])
        return result
    from mlx_lm.models.cache import make_prompt_cache

    from mlx_optiq_ext.prompts import divided

    provider = instance.model_provider
    if not run.divides(provider.model_key, lambda: make_prompt_cache(provider.model)):
        return result
    prompt, segments, kinds, *rest = result
    enders = provider.tokenizer.eos_token_ids
    return prompt, *divided(segments, kinds, enders), *rest


def _serve_single(wrapped, instance, args, kwargs):
    if session.state(Run) is None:
        return wrapped(*args, **kwargs)
    provider = instance.model_provider

    def keep(tokens, caches):
        # The request goes on with its own.
        instance.prompt_cache.insert_cache(provider.model_key, tokens, copy.deepcopy(caches))

    token = alone.set(Alone(keep, provider.tokenizer.eos_token_ids))
    try:
        return wrapped(*args, **kwargs)
    finally:
        alone.reset(token)


USES = (
    *of(
        "mlx_lm.server",
        *(f"ModelProvider.{name}" for name in ("draft_model", "model", "model_key", "tokenizer")),
    ),
    *of(
        "mlx_lm.server",
        *(f"ResponseGenerator.{name}" for name in ("model_provider", "prompt_cache")),
    ),
    *of("mlx_lm.tokenizer_utils", "TokenizerWrapper.eos_token_ids"),
    *of(
        "mlx_lm.models.cache",
        *(f"LRUPromptCache.{name}" for name in ("fetch_nearest_cache", "insert_cache")),
        *("KVCache.keys", "KVCache.values", "KVCache.offset", "KVCache.state", "KVCache.empty"),
        *("ArraysCache.batch_size", "ArraysCache.state", "CacheList.caches"),
    ),
)


def _patch(attribute: str, wrapper, why: str) -> Patch:
    return Patch(
        f"mlx_lm.server:{attribute}",
        feature="prompts",
        why=why,
        upstream="none: prompt caches live in memory only (server.py)",
        wrapper=wrapper,
        uses=USES,
    )


PATCHES = (
    _patch("ModelProvider.load", load, "knows the files of the served model"),
    _patch("ResponseGenerator._tokenize", _tokenize, "keeps states at the ends of messages"),
    _patch(
        "ResponseGenerator._serve_single", _serve_single, "keeps states of prompts served alone"
    ),
    _patch("ResponseGenerator.__init__", __init__, "puts prompts on disk behind those in memory"),
)
