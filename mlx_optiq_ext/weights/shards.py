"""Splits weight files so that they can be written with little memory."""

import mlx.core as mx

from .precision import Precision


def by_source(
    weights: dict[str, mx.array], precisions: dict[str, Precision], limit: int
) -> list[dict[str, mx.array]]:
    """Split weights into shards whose unquantized originals fit a limit.

    MLX may read all originals of a shard before it quantizes the first one.

    Args:
        weights: Parameter path -> what to store, not evaluated.
        precisions: Tensor path -> its precision.
        limit: Bytes; a larger tensor gets a shard of its own.
    """
    shards: list[dict[str, mx.array]] = []
    size = 0
    for path, array in weights.items():
        precision = precisions.get(path.removesuffix(".weight"))
        source = array.nbytes
        if precision is not None and precision.quantized:
            source = source * 16 // precision.bits
        if not shards or size + source > limit:
            shards.append({})
            size = 0
        shards[-1][path] = array
        size += source
    return shards
