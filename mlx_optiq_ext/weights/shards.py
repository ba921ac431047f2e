"""Weight files small enough to be written within little memory."""

import mlx.core as mx

from .packing import Packing


def by_source(
    weights: dict[str, mx.array], packings: dict[str, Packing], limit: int
) -> list[dict[str, mx.array]]:
    """Split weights into shards whose unquantized originals take a limit at most.

    MLX may read all originals of a shard before it packs the first one.

    Args:
        weights: Parameter path -> what to store, not evaluated.
        packings: Tensor path -> its packing.
        limit: Bytes; a larger tensor gets a shard of its own.
    """
    shards: list[dict[str, mx.array]] = []
    size = 0
    for path, array in weights.items():
        packing = packings.get(path.removesuffix(".weight"))
        source = array.nbytes
        if packing is not None and packing.packed:
            source = source * 16 // packing.bits
        if not shards or size + source > limit:
            shards.append({})
            size = 0
        shards[-1][path] = array
        size += source
    return shards
