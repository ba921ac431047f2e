"""Chooses how attention over packed keys and values is computed."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from ...kernels import Platform, current
from ..packed_array import Packed
from . import blocks, composed, fused, kernels

#: ``(queries, keys, values, scale, mask, sinks) -> output``, all in the stored basis.
Backend = Callable[..., mx.array]
#: Like `Backend`, but returns None for a call that it leaves to others.
Offered = Callable[..., mx.array | None]

#: Up to this many queries count as decoding (with speculation); more are a chunk of a prompt.
DECODING = 8


def choose(
    platform: Platform,
    queries: mx.array,
    keys: Packed | mx.array,
    values: Packed | mx.array,
    mask: mx.array | str | None,
) -> Backend:
    """The function that attends on a platform, for a call of this kind."""
    if platform.name == "cpu":
        return blocks.attend
    if platform.compile is not None and kernels.supports(queries, keys, values, mask):
        return partial(kernels.attend, platform)
    if (
        platform.name == "metal"
        and queries.shape[2] <= DECODING
        and composed.supports(keys, values)
    ):
        return composed.attend
    return fused.attend


def attend(
    queries: mx.array,
    keys: Packed | mx.array,
    values: Packed | mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    backends: Sequence[Offered] = (),
    platform: Platform | None = None,
) -> mx.array:
    """Scaled dot-product attention; none of the caller's arrays is changed.

    Args:
        queries: (batch, query heads, length, dim).
        keys: (batch, heads, tokens, dim), packed or not.
        values: (batch, heads, tokens, value dim), packed or not.
        scale: Factor on the scores.
        mask: ``"causal"``, or an array that broadcasts to (batch, query heads, length, tokens):
            bool, True where a query attends, or values to add to the scores.
        sinks: (query heads,), one logit for each head that takes probability without a value
            (gpt-oss).
        backends: Functions asked before the package's own; None from one means the next.
        platform: Where to attend; None for where the keys' cache does, or MLX's default device is.

    Returns:
        (batch, query heads, length, value dim) in the queries' dtype.
    """
    if keys.shape[2] == 0:  # MLX's products divide by zero on packed data of no rows
        return mx.zeros((*queries.shape[:-1], values.shape[-1]), queries.dtype)
    if platform is None:
        platform = (keys.platform if isinstance(keys, Packed) else None) or current()
    if isinstance(keys, Packed):
        queries = kernels.turned(platform, queries, keys.format)
        sinks = None if sinks is None else keys.format.turn_sinks(sinks)
    call: Any = (queries, keys, values, scale, mask, sinks)
    offered = (backend(*call) for backend in backends)
    output = next((found for found in offered if found is not None), None)
    if output is None:
        if platform.compile is not None and kernels.supports(queries, keys, values, mask):
            return kernels.attend(platform, *call, turn_back=True)
        output = choose(platform, queries, keys, values, mask)(*call)
    return values.format.turn_back(output) if isinstance(values, Packed) else output
