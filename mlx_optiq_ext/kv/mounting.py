"""Mounts a KV plan on a model: which layers it packs, how, and what the model can work with."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import distributed
from .._status import note
from ..errors import InputError, OptiqError, UnsupportedError
from ..model.layers import decoder_layers
from .formats import Affine
from .key_statistics import COUNT, LENGTH, transforms, unfitted, with_transforms
from .layout import NAME, Mounted, Slot, mounted_on, owners, packed_caches, stock_caches
from .plan import KVPlan, LayerFormat, check_layers

#: Errors of code that gets a packed array, or a batch, and cannot work with it. Errors of memory
#: and of kernels that do not compile are not among them.
UNREADABLE = (AttributeError, IndexError, NotImplementedError, TypeError, ValueError)


def mount(model: nn.Module, plan: KVPlan, *, mergeable: bool = True) -> Mounted:
    """Give a loaded model a KV plan: `make_caches` then packs the layers that it names.

    Three tokens are run through the model, so that an unsuitable model is refused here. Where keys
    are transformed and the plan does not say how, `key_statistics` runs 2,048 more.

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
    mounted = _with_transforms(model, mounted)
    object.__setattr__(model, NAME, mounted)
    return mounted


def _mounted(model: nn.Module, plan: KVPlan, mergeable: bool) -> Mounted:
    """The mounted plan, tested on this rank."""
    found = owners(model)
    formats = _formats(model, plan, found)
    name = type(model).__module__
    dense = False
    given, formats = formats, {slot: _untransformed(f) for slot, f in formats.items()}
    try:
        caches = _try(model, Mounted(formats, found, dense, mergeable=False), rows=1)
    except OptiqError:
        raise
    except UNREADABLE as error:
        dense = True
        try:
            caches = _try(model, Mounted(formats, found, dense, mergeable=False), rows=1)
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
    known = {slot: _fitting(f, caches, slot, plan) for slot, f in given.items()}
    alike = frozenset(slot for slot in known if _alike(_at(caches, slot)))
    return Mounted(known, found, dense, mergeable, alike)


def attends_itself(
    model: nn.Module, formats: Mapping[Slot, LayerFormat], found: Mapping[Slot, int]
) -> bool:
    """Whether a model cannot read packed keys and values, so that its caches must be dense."""
    try:
        _try(model, Mounted(formats, found, dense=False, mergeable=False), rows=1)
    except OptiqError:
        raise
    except UNREADABLE:
        return True
    return False


def _at(caches: list[Any], slot: Slot) -> Any:
    holder = caches[slot[0]]
    return holder if slot[1] is None else holder.caches[slot[1]]


def _alike(cache: Any) -> bool:
    """Whether a cache's keys and values may share arrays, for kernels that read them."""
    dims, dtype = cache.dims, cache.dtype
    return dims is not None and dims[0] == dims[1] and dtype in ("bfloat16", "float16")


def _untransformed(formats: LayerFormat) -> LayerFormat:
    keys = formats.keys
    if isinstance(keys, Affine) and keys.transformed:
        return replace(formats, keys=replace(keys, transformed=False, transform=None))
    return formats


def _fitting(formats: LayerFormat, caches: list[Any], slot: Slot, plan: KVPlan) -> LayerFormat:
    """These formats, if what their transform is for are the keys of a cache."""
    keys = formats.keys
    if not isinstance(keys, Affine) or keys.transform is None:
        return formats
    cache = _at(caches, slot)
    has, wants = (cache.heads, cache.dims[0]), keys.transform.basis.shape[:2]
    if has == wants:
        return formats
    if (count := distributed.size()) > 1 and wants == (has[0] * count, has[1]):
        # Each process has the same number of heads, in the order of ranks.
        first = distributed.rank() * has[0]
        return formats.with_transform(keys.transform.of_heads(first, first + has[0]))
    raise InputError(
        f"{plan.source}: the transform of layer {cache.layer} is for {wants[0]} heads of "
        f"{wants[1]}, and this model has {has[0]} of {has[1]}: is the plan another model's?"
    )


def _with_transforms(model: nn.Module, mounted: Mounted) -> Mounted:
    """The mounted plan with the transforms that it lacks, fitted by all processes together."""
    if any(distributed.gathered(bool(unfitted(mounted)))):
        if distributed.leads():
            tokens = f"{COUNT * LENGTH:,} random tokens"
            print(
                f"[optiq] fitting the transforms of keys to {tokens}, which takes as long as a "
                "prompt of that length",
                file=sys.stderr,
                flush=True,
            )
        return with_transforms(mounted, transforms(model, mounted))
    return mounted


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
        object.__delattr__(model, NAME)


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


def _try(model: nn.Module, mounted: Mounted, rows: int) -> list[Any]:
    """Run a prompt of two tokens and one more, in a batch if there are more rows than one.

    Returns the caches.
    """
    caches = packed_caches(stock_caches(model), mounted)
    if rows > 1:
        if not all(hasattr(cache, "merge") for cache in caches):
            return caches
        others = [packed_caches(stock_caches(model), mounted) for _ in range(rows)]
        caches = [row[0].merge(list(row)) for row in zip(*others, strict=True)]
    for length in (2, 1):
        mx.eval(model(mx.zeros((rows, length), dtype=mx.int32), cache=caches))
    if rows > 1:
        # A finished request extracts its row, which fails on a cache that no layer uses.
        for cache in caches:
            cache.extract(0)
    return caches
