"""Finds the cache of each decoder layer, and builds packed caches in their place."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import distributed
from ..model.layers import calls_replaced, decoder_layers
from .cache import PackedKVCache
from .plan import LayerFormat

#: A cache's number in the model's list and, in a CacheList, its number there.
Slot = tuple[int, int | None]

#: Architectures whose CacheList ends with the index of sparse attention, which selects tokens by
#: its own keys: that cache is not packed.
INDEXED = ("deepseek_v32", "glm_moe_dsa", "minimax_m3_vl")

#: Attribute of a model that holds its mounted plan.
NAME = "_optiq_kv"


@dataclass(frozen=True)
class Mounted:
    """How a model's caches are built.

    Attributes:
        formats: Slot -> formats of its keys and values.
        owners: Slot -> the decoder layer that writes to it.
        dense: Whether the model's attention needs plain arrays.
        mergeable: Whether mlx-lm's batch engine may merge the caches.
        alike: Slots whose keys and values have the same dimension and half precision.
    """

    formats: Mapping[Slot, LayerFormat]
    owners: Mapping[Slot, int]
    dense: bool
    mergeable: bool
    alike: frozenset[Slot] = frozenset()


def mounted_on(model: Any) -> Mounted | None:
    """The plan that `mount` stored on a model, or None."""
    return getattr(model, "__dict__", {}).get(NAME)


def make_caches(model: nn.Module, max_kv_size: int | None = None) -> list[Any]:
    """The model's prompt cache, packed as its mounted plan says."""
    mounted = mounted_on(model)
    caches = stock_caches(model, max_kv_size)
    return caches if mounted is None else packed_caches(caches, mounted)


def packed_caches(
    caches: list[Any], mounted: Mounted, kind: type[PackedKVCache] = PackedKVCache
) -> list[Any]:
    """Packed caches in place of the empty mlx-lm caches that ``mounted`` names."""
    for slot, formats in mounted.formats.items():
        index, member = slot
        holder = caches[index]
        inner = holder if member is None else holder.caches[member]
        cache = kind(
            inner,
            formats,
            dense=mounted.dense,
            mergeable=mounted.mergeable,
            stacked=slot in mounted.alike,
            layer=mounted.owners[slot],
        )
        if member is None:
            caches[index] = cache
        else:
            members = list(holder.caches)
            members[member] = cache
            holder.caches = tuple(members)
    return caches


def owners(model: nn.Module) -> dict[Slot, int]:
    """The decoder layer, of the whole model, that writes to each cache of keys and values.

    The model is run on one token, and each layer's arguments are searched for a cache: lists of
    caches do not always have one for each layer (shared keys and values, blocks without attention,
    loops).
    """
    caches = stock_caches(model)
    layers = decoder_layers(model)
    users: dict[int, int] = {}
    stage = distributed.stage_of(model)
    first = 0 if stage is None else stage.start

    def call(index: int, original: Any, args: tuple, kwargs: dict) -> Any:
        for value in (*args, *kwargs.values()):
            users.setdefault(id(value), first + index)
        return original(*args, **kwargs)

    with calls_replaced(layers, call):
        mx.eval(model(mx.array([[0]]), cache=caches))
    found = {}
    for index, cache in enumerate(caches):
        owner = users.get(id(cache), first + index if len(caches) == len(layers) else None)
        if owner is not None:
            found.update({(index, member): owner for member in _members(model, cache)})
    return found


def stock_caches(model: nn.Module, max_kv_size: int | None = None) -> list[Any]:
    """mlx-lm's own caches, without the mounted plan."""
    from mlx_lm.models.cache import make_prompt_cache

    make = getattr(make_prompt_cache, "__wrapped__", make_prompt_cache)
    return make(model, max_kv_size)


def _members(model: nn.Module, cache: Any) -> Iterator[int | None]:
    """Where a cache keeps keys and values: in itself (None), or in members of a CacheList."""
    if isinstance(getattr(cache, "caches", None), list | tuple):
        indexed = type(model).__module__.rpartition(".")[2] in INDEXED
        for number, member in enumerate(cache.caches):
            if _keeps(member) and not (indexed and number == 1):
                yield number
    elif _keeps(cache):
        yield None


def _keeps(cache: Any) -> bool:
    return hasattr(cache, "update_and_fetch") and hasattr(cache, "keys")
