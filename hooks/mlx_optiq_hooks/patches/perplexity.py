"""``mlx_lm.perplexity``: keys and values go through the caches of the KV plan."""

from ..commands import kv as command
from ..engine.patch import Patch, bind


def eval_ppl(wrapped, instance, args, kwargs):
    call = bind(wrapped, args, kwargs)
    model = call["model"]
    if not command.mounted(model):
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext import kv
    from mlx_optiq_ext.model.vocabulary import check_tokens

    check_tokens(model, call["data"])
    call["model"] = lambda tokens: model(tokens, cache=kv.make_caches(model))
    return wrapped(**call)


PATCHES = (
    Patch(
        "mlx_lm.perplexity:eval_ppl",
        feature="kv",
        why="measures perplexity with packed keys and values",
        upstream="none: it runs the model without a cache (perplexity.py)",
        wrapper=eval_ppl,
    ),
)
