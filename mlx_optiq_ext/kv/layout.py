"""Finds the cache of each decoder layer, and replaces mlx-lm's caches by packed ones."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import distributed
from .._status import note
from ..errors import InputError, OptiqError, UnsupportedError
from ..model.layers import calls_replaced, decoder_layers
from .cache import PackedKVCache
from .plan import KVPlan, LayerFormat, check_layers

#: A cache's number in the model's list and, in a CacheList, its number there.
Slot = tuple[int, int | None]

#: Architectures whose CacheList ends with the index of sparse attention, which selects tokens by
#: its own keys: that cache is not packed.
INDEXED = ("deepseek_v32", "glm_moe_dsa", "minimax_m3_vl")

#: Errors of code that gets a packed array, or a batch, and cannot work with it. Errors of memory
#: and of kernels that do not compile are not among them.
UNREADABLE = (AttributeError, IndexError, NotImplementedError, TypeError, ValueError)

_NAME = "_optiq_kv"


@dataclass(frozen=True)
class Mounted:
    """How a model's caches are built.

    Attributes:
        formats: Slot -> formats of its keys and values.
        owners: Slot -> the decoder layer that writes to it.
        dense: Whether the model's attention needs plain arrays.
        mergeable: Whether mlx-lm's batch engine may merge the caches.
    """

    formats: Mapping[Slot, LayerFormat]
    owners: Mapping[Slot, int]
    dense: bool
    mergeable: bool


def mount(model: nn.Module, plan: KVPlan, *, mergeable: bool = True) -> Mounted:
    """Give a loaded model a KV plan: `make_caches` then packs the layers that it names.

    Three tokens are run through the model, so that an unsuitable model is refused here.

    Args:
        model: An mlx-lm model.
        plan: The precision of each layer's keys and values.
        mergeable: Whether mlx-lm's batch engine may merge the caches.

    Raises:
        InputError: The plan names a layer that does not exist or keeps no keys and values.
        UnsupportedError: The model cannot work with packed keys and values.
    """
    stage = distributed.stage_of(model)
    if stage is None:
        mounted = _mounted(model, plan, mergeable)
    else:
        with distributed.together(), distributed.apart(model):
            check_layers(plan, _layer_count(stage))
            mounted = _mounted(model, plan, mergeable)
            packs, merges = zip(
                *distributed.gathered((mounted.owners, mounted.mergeable)), strict=True
            )
            if not any(packs):
                raise _nothing_kept(model)
            # All ranks batch, or none does.
            mounted = replace(mounted, mergeable=all(merges))
    object.__setattr__(model, _NAME, mounted)
    return mounted


def _mounted(model: nn.Module, plan: KVPlan, mergeable: bool) -> Mounted:
    """The mounted plan, tested on this rank."""
    found = owners(model)
    formats = _formats(model, plan, found)
    name = type(model).__module__
    dense = False
    try:
        _try(model, Mounted(formats, found, dense, mergeable=False), rows=1)
    except OptiqError:
        raise
    except UNREADABLE as error:
        dense = True
        try:
            _try(model, Mounted(formats, found, dense, mergeable=False), rows=1)
        except UNREADABLE as second:
            raise UnsupportedError(
                f"{name} cannot work with packed keys and values "
                f"({type(second).__name__}: {second}): leave --optiq-kv out"
            ) from second
        note(f"{name} computes attention itself: keys and values are unpacked for it", error)
    if mergeable:
        try:
            _try(model, Mounted(formats, found, dense, mergeable), rows=2)
        except UNREADABLE as error:
            mergeable = False
            note(f"{name} cannot batch packed keys and values: one request at a time", error)
    return Mounted(formats, found, dense, mergeable)


def _layer_count(own: distributed.Stage) -> int:
    """Layers of a pipelined model, each of which must be in the stage of one rank."""
    stages = sorted((each.start, each.end) for each in distributed.gathered(own))
    ends = [0, *(end for _, end in stages)]
    if [start for start, _ in stages] != ends[:-1]:
        raise UnsupportedError(
            f"this mlx-lm leaves out or repeats layers between {len(stages)} ranks: take a number "
            "of ranks that divides the model's layers, or a newer mlx-lm"
        )
    return ends[-1]


def unmount(model: nn.Module) -> None:
    """Remove a model's KV plan."""
    if mounted_on(model) is not None:
        object.__delattr__(model, _NAME)


def mounted_on(model: Any) -> Mounted | None:
    """The plan that `mount` stored on a model, or None."""
    return getattr(model, "__dict__", {}).get(_NAME)


def make_caches(model: nn.Module, max_kv_size: int | None = None) -> list[Any]:
    """The model's prompt cache, packed as its mounted plan says."""
    mounted = mounted_on(model)
    caches = stock_caches(model, max_kv_size)
    return caches if mounted is None else packed_caches(caches, mounted)


def packed_caches(caches: list[Any], mounted: Mounted) -> list[Any]:
    """Packed caches in place of the empty mlx-lm caches that ``mounted`` names."""
    for slot, formats in mounted.formats.items():
        index, member = slot
        holder = caches[index]
        inner = holder if member is None else holder.caches[member]
        cache = PackedKVCache(
            inner,
            formats,
            dense=mounted.dense,
            mergeable=mounted.mergeable,
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


def _formats(model: nn.Module, plan: KVPlan, found: Mapping[Slot, int]) -> dict[Slot, LayerFormat]:
    stage = distributed.stage_of(model)
    if stage is None:
        if not found:
            raise _nothing_kept(model)
        stage = distributed.Stage(0, len(decoder_layers(model)))
        check_layers(plan, stage.end)
    if plan.everywhere is not None:
        return dict.fromkeys(found, plan.everywhere)
    for index in plan.layers:
        if stage.start <= index < stage.end and index not in found.values():
            raise InputError(
                f"{plan.source}: layer {index} of this model keeps no keys and values of its own "
                "(a recurrent layer, or one that shares another's): leave it out"
            )
    return {slot: plan.layers[owner] for slot, owner in found.items() if owner in plan.layers}


def _nothing_kept(model: nn.Module) -> UnsupportedError:
    return UnsupportedError(
        f"{type(model).__module__} keeps no keys and values that could be packed: leave --optiq-kv "
        "out"
    )


def _try(model: nn.Module, mounted: Mounted, rows: int) -> None:
    """Run a prompt of two tokens and one more, in a batch if there are more rows than one."""
    caches = packed_caches(stock_caches(model), mounted)
    if rows > 1:
        if not all(hasattr(cache, "merge") for cache in caches):
            return
        others = [packed_caches(stock_caches(model), mounted) for _ in range(rows)]
        caches = [row[0].merge(list(row)) for row in zip(*others, strict=True)]
    for length in (2, 1):
        mx.eval(model(mx.zeros((rows, length), dtype=mx.int32), cache=caches))
    if rows > 1:
        # A finished request extracts its row, which fails on a cache that no layer uses.
        for cache in caches:
            cache.extract(0)
