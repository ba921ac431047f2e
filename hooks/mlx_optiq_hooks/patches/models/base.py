"""``mlx_lm.models.base``: attention over packed keys and values."""

import functools
from typing import Any

from ...engine.patch import Patch
from ...installation import attention_backends


@functools.cache
def _names(function: Any) -> tuple[str, ...]:
    """Names of a function's parameters, cached because this runs at each layer of each token."""
    import inspect

    return tuple(inspect.signature(function).parameters)


def scaled_dot_product_attention(wrapped, instance, args, kwargs):
    # This wrapper is called most often: without a KV plan it takes two look-ups.
    keys = args[1] if len(args) > 1 else kwargs["keys"]
    values = args[2] if len(args) > 2 else kwargs["values"]
    if not (hasattr(keys, "format") or hasattr(values, "format")):
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext.kv import attend

    call = dict(zip(_names(wrapped), args, strict=False)) | kwargs
    # The cache is not needed: packed keys and values carry their format.
    call.pop("cache", None)
    return attend(**call, backends=attention_backends())


PATCHES = (
    Patch(
        "mlx_lm.models.base:scaled_dot_product_attention",
        feature="kv",
        why="computes attention over packed keys and values",
        upstream="none: one width for a cache, no sinks, no shared keys (base.py)",
        wrapper=scaled_dot_product_attention,
    ),
)
