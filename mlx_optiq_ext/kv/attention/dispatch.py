"""Chooses how attention over packed keys and values is computed."""

from collections.abc import Callable

import mlx.core as mx

from ..packed import Packed, rotate, rotate_back
from . import blocks, composed, fused

#: ``(queries, keys, values, scale, mask, sinks) -> output``, all in the stored basis.
Backend = Callable[..., mx.array]

#: Queries up to this many are decoding (speculation included); more are a prompt's chunk.
DECODING = 8


def backend() -> str:
    """``"cpu"``, ``"metal"`` or ``"cuda"``: where the default device runs."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def choose(name: str, length: int) -> Backend:
    """The function for a backend and a number of queries."""
    if name == "cpu":
        return blocks.attend
    if name == "metal" and length <= DECODING:
        return composed.attend
    return fused.attend


def attention(
    queries: mx.array,
    keys: Packed | mx.array,
    values: Packed | mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Scaled dot-product attention; none of the caller's arrays is changed.

    Args:
        queries: (batch, query heads, length, dim).
        keys: (batch, heads, tokens, dim), packed or not.
        values: (batch, heads, tokens, value dim), packed or not.
        scale: Factor on the scores.
        mask: ``"causal"``, or what broadcasts to (batch, query heads, length, tokens): bool with
            True where to look, or added to the scores.
        sinks: (query heads,), a logit a head that takes probability and gives nothing (gpt-oss).

    Returns:
        (batch, query heads, length, value dim) in the queries' dtype.
    """
    # Rotating both sides of a product leaves it as it was.
    if isinstance(keys, Packed) and keys.format.rotated:
        queries = rotate(queries)
    attend = choose(backend(), queries.shape[2])
    output = attend(queries, keys, values, scale, mask, sinks)
    if isinstance(values, Packed) and values.format.rotated:
        output = rotate_back(output)
    return output
