"""What blocks are computed with: prompts of different spaces share nothing."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import distributed
from ..kv import PackedKVCache
from ..kv.kept import tokens as kept
from ..kv.plane_state import described, transformed
from . import chain
from .splitting import leaves, planes

#: Changes with the meaning of our files.
LAYOUT = 1

#: Settings of mlx-lm's caches that change what they hold.
_SETTINGS = ("max_size", "keep", "chunk_size")


@dataclass(frozen=True)
class Space:
    """What a prompt is computed with.

    Attributes:
        digest: Hash of all of it, the name of its folder.
        make: Makes the empty caches of one row.
    """

    digest: str
    make: Callable[[], list[Any]]


def space_of(
    make: Callable[[], list[Any]],
    model: str,
    adapters: Sequence[tuple[str, float]] = (),
    block: int = chain.BLOCK,
) -> Space:
    """The space of a model, or of the part of it that this process runs.

    Args:
        make: Makes the empty caches of one row, as the KV plan says.
        model: Digest of the model's files.
        adapters: Digest and scale of each adapter in use.
        block: Tokens of a block, at whose ends caches keep all that goes on behind them.
    """
    from importlib.metadata import version

    digest = hashlib.sha256()
    caches = [_layout(cache, digest) for cache in leaves(make())]
    part = [distributed.rank(), distributed.size()]
    content = [LAYOUT, version("mlx-lm"), model, [list(each) for each in adapters], part, caches]
    digest.update(json.dumps(content).encode())

    def marked() -> list[Any]:
        caches = make()
        for cache in leaves(caches):
            if isinstance(cache, PackedKVCache):
                kept.mark_ends(cache, block)
        return caches

    return Space(digest.hexdigest()[:16], marked)


def _layout(cache: Any, digest: Any) -> list[Any]:
    """What an empty cache keeps and how; transforms are added to the digest."""
    inner = planes(cache)
    settings = [getattr(inner[0], name, None) for name in _SETTINGS]
    found: list[Any] = [type(inner[0]).__name__, len(inner), settings]
    if isinstance(cache, PackedKVCache):
        found.append(described(cache))
        keys = transformed(cache.formats)
        if keys is not None and keys.transform is not None:
            for array in (keys.transform.centre, keys.transform.basis):
                digest.update(np.ascontiguousarray(array).tobytes())
    return found
