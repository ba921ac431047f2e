"""Chooses how attention over packed keys and values is computed."""

import os
from collections.abc import Callable, Sequence
from functools import cache, partial

import mlx.core as mx

from ..packed import Packed
from . import blocks, composed, fused, kernels

#: ``(queries, keys, values, scale, mask, sinks) -> output``, all in the stored basis.
Backend = Callable[..., mx.array]
#: The same, or None for a call that it leaves to others.
Offered = Callable[..., mx.array | None]

#: Queries up to this many are decoding (speculation included); more are a prompt's chunk.
DECODING = 8


def backend() -> str:
    """``"cpu"``, ``"metal"`` or ``"cuda"``: where the default device runs."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def choose(
    name: str,
    queries: mx.array,
    keys: Packed | mx.array,
    values: Packed | mx.array,
    mask: mx.array | str | None,
) -> Backend:
    """The function that attends on a backend, for a call of this kind."""
    if name == "cpu":
        return blocks.attend
    if has_kernel(name) and kernels.supports(queries, keys, values, mask):
        return partial(kernels.attend, name)
    if name == "metal" and queries.shape[2] <= DECODING and composed.supports(keys, values):
        return composed.attend
    return fused.attend


def has_kernel(name: str) -> bool:
    """Whether a GPU backend runs kernels of our own."""
    if name == "cuda":
        return _tensor_cores()
    # The Metal kernel was never timed, so that it waits to be asked for.
    return os.environ.get("MLX_OPTIQ_EXT_METAL_KERNEL") == "1"


@cache
def _tensor_cores() -> bool:
    """Whether MLX compiles CUDA source and the GPU multiplies as the kernel asks it to."""
    from mlx_optiq_compat import symbols

    if not symbols.has_cuda_kernels():
        return False
    return int(symbols.device_info().get("compute_capability_major", 8)) >= 8


def attention(
    queries: mx.array,
    keys: Packed | mx.array,
    values: Packed | mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    backends: Sequence[Offered] = (),
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
        backends: Functions asked before the package's own; None from one means the next.

    Returns:
        (batch, query heads, length, value dim) in the queries' dtype.
    """
    if keys.shape[2] == 0:  # MLX's products divide by zero on packed data of no rows
        return mx.zeros((*queries.shape[:-1], values.shape[-1]), queries.dtype)
    # Rotating both sides of a product leaves it as it was.
    if isinstance(keys, Packed):
        queries = keys.format.turn(queries)
    own = choose(backend(), queries, keys, values, mask)
    call = (queries, keys, values, scale, mask, sinks)
    offered = (attend(*call) for attend in backends)
    output = next((found for found in offered if found is not None), None)
    if output is None:
        output = own(*call)
    return values.format.turn_back(output) if isinstance(values, Packed) else output
