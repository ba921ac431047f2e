"""Saved prompt caches with packed layers, checked before mlx-lm builds anything from them.

mlx-lm's file is a safetensors of the caches' arrays, named by their place in a tree (``0.1.2``: the
third of the second of the first cache), whose metadata is another such tree: the user's notes,
the caches' classes, and which arrays stand for scalars. A number in such a name makes a list of
that length.
Source: ``save_prompt_cache`` in mlx_lm/models/cache.py, ``tree_unflatten`` in mlx/utils.py.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import files
from ..errors import InputError
from .cache import PackedKVCache
from .formats import Affine
from .plan import KVPlan, LayerFormat
from .plane_state import transformed

#: Most levels of nesting in a tree.
DEPTH = 12
#: Most places without an array, in all lists together.
HOLES = 1024

#: Names of mlx-lm's caches that a plan for every layer packs.
PLAIN = ("ChunkedKVCache", "KVCache", "RotatingKVCache")

#: Errors of a cache class that gets another class's state.
_FOREIGN = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def load(read: Callable[[], Any], path: Path) -> Any:
    """Load a saved prompt cache; one without packed layers as mlx-lm does.

    Args:
        read: mlx-lm's own loading of this file.
        path: The file.

    Raises:
        InputError: It has packed layers, and is damaged or does not fit this mlx-lm.
    """
    if not _has_header(path):
        return read()  # mlx-lm reports a file that is not safetensors
    header = files.read_header(path)
    if PackedKVCache.__name__ not in header.metadata.values():
        return read()
    _check_tree(header.tensors, f"{path}: tensors")
    _check_tree(header.metadata, f"{path}: metadata")
    try:
        return read()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except _FOREIGN as error:
        raise InputError(
            f"{path} does not fit this version of mlx-lm ({type(error).__name__}): save the prompt "
            "cache again"
        ) from error


def check_plan(caches: Iterable[Any], plan: KVPlan, path: Path) -> None:
    """Refuse a prompt cache that was saved at another precision than a plan asks for.

    What is saved stays as it is, and so does what is added to it.

    Args:
        caches: Those of one model, as they were loaded.
        plan: What was asked for.
        path: Their file, for the message.

    Raises:
        InputError: The plan does not describe these caches.
    """
    leaves = list(_leaves(caches))
    packed = [each for each in leaves if isinstance(each, PackedKVCache)]
    if not packed and not plan.packs:
        return
    if not packed:
        raise InputError(
            f"{path} was saved without --optiq-kv, and its keys and values stay as they are: leave "
            "--optiq-kv out, or save the prompt cache with it"
        )
    different = f"{path} was saved with another KV plan than --optiq-kv {plan.source}"
    remedy = "leave --optiq-kv out to go on with what was saved, or save the prompt cache again"
    for cache in packed:
        asked = plan.everywhere
        if asked is None:
            if cache.layer is None:
                continue  # it was not built for a layer of a model
            asked = plan.layers.get(cache.layer, LayerFormat(None, None))
        if cache.dims is not None:
            asked = asked.fitted(*cache.dims)
        if not _same(asked, cache.formats):
            where = "" if cache.layer is None else f"layer {cache.layer} "
            raise InputError(f"{different} ({where}has {cache.formats}, not {asked}): {remedy}")
    saved = {cache.layer for cache in packed}
    for layer in plan.layers:
        if not {layer, None} & saved:
            raise InputError(f"{different} (layer {layer} is not quantized in it): {remedy}")
    if plan.everywhere is not None and any(type(each).__name__ in PLAIN for each in leaves):
        raise InputError(f"{different} (not all of its layers are quantized): {remedy}")


def _same(asked: LayerFormat, found: LayerFormat) -> bool:
    """Whether these are the formats asked for; a transform that was not given may be any."""
    keys = transformed(asked)
    if keys is not None and keys.transform is None and isinstance(found.keys, Affine):
        found = replace(found, keys=replace(found.keys, transform=None))
    return asked == found


def _leaves(caches: Iterable[Any]) -> Iterator[Any]:
    """All caches, those in a CacheList one by one.

    Of a CacheList with a packed cache the others are left out: some are never packed.
    """
    for cache in caches:
        members = getattr(cache, "caches", None)
        if not isinstance(members, list | tuple):
            yield cache
            continue
        packed = [each for each in members if isinstance(each, PackedKVCache)]
        yield from packed or members


def _has_header(path: Path) -> bool:
    try:
        with files.open_regular(path) as stream:
            return stream.read(9)[8:] == b"{"
    except InputError:
        return False


def _check_tree(names: Iterable[str], where: str) -> None:
    """Refuse names that do not form a tree whose lists have few gaps.

    Places without an array, such as missing notes or an empty cache, leave a gap.
    """
    children: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        if len(parts) > DEPTH:
            raise InputError(f"{where} are nested deeper than those of any cache: save it again")
        for place in range(len(parts)):
            children.setdefault(".".join(parts[:place]), set()).add(parts[place])
    holes = 0
    for prefix, found in children.items():
        numbers = {number for part in found if (number := _place(part)) is not None}
        holes += max(numbers, default=-1) + 1 - len(numbers)
        if (numbers and (len(numbers) < len(found) or min(numbers) < 0)) or holes > HOLES:
            raise InputError(
                f"{where} of {files.shown(prefix)} do not make a list: save the prompt cache again"
            )


def _place(part: str) -> int | None:
    """The index that MLX reads from a name, or None."""
    try:
        return int(part)
    except ValueError:
        return None
