"""Splits a prompt cache into blocks of tokens and snapshots, and joins them bit for bit.

Keys and values of full attention stand one position behind another: any range of them is a block.
Other layers (recurrent ones, sliding windows, chunks) hold a state that belongs to one length of
the prompt: a snapshot of them is taken whole.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import InputError
from ..kv import PackedKVCache
from ..kv.kept import tokens as kept
from .block_file import Piece, held, restored

_MISFIT = "blocks of a prompt cache do not fit each other"

#: mlx-lm's cache of full attention.
_PER_TOKEN = "KVCache"


def leaves(caches: Sequence[Any]) -> list[Any]:
    """The caches, those in a CacheList one by one."""
    found: list[Any] = []
    for cache in caches:
        members = getattr(cache, "caches", None)
        found += leaves(members) if isinstance(members, list | tuple) else [cache]
    return found


def planes(cache: Any) -> list[Any]:
    """The mlx-lm caches that hold a layer's arrays."""
    return cache.planes if isinstance(cache, PackedKVCache) else [cache]


def per_token(cache: Any) -> bool:
    """Whether any range of tokens can be taken out of a cache."""
    return all(type(plane).__name__ == _PER_TOKEN for plane in planes(cache))


def has_snapshots(caches: Sequence[Any]) -> bool:
    """Whether some layer's state belongs to one length of the prompt."""
    return not all(map(per_token, leaves(caches)))


def storable(caches: Sequence[Any]) -> bool:
    """Whether the state of all layers can be given to new caches; a few classes cannot take it."""
    held = [plane for cache in leaves(caches) for plane in planes(cache)]
    return all(getattr(type(plane).state, "fset", None) for plane in held)


def covered(caches: Sequence[Any], count: int) -> int:
    """How many of ``count`` tokens the caches hold; 0 if they do not agree.

    A layer that is never used stays empty, and a recurrent one does not say its length.
    """
    used = [cache for cache in leaves(caches) if not cache.empty()]
    offsets = {cache.offset for cache in used if isinstance(getattr(cache, "offset", None), int)}
    if not used or len(offsets) > 1 or any(_rows(cache) != 1 for cache in used):
        return 0
    return min(offsets.pop(), count) if offsets else count


def align(caches: Sequence[Any]) -> None:
    """Trim caches that can be trimmed to the shortest of them.

    With a draft model one of the two holds a token more at times.
    """
    used = [cache for cache in leaves(caches) if not cache.empty()]
    if used and all(map(per_token, used)):
        length = min(cache.offset for cache in used)
        for cache in used:
            cache.trim(cache.offset - length)


def exact(caches: Sequence[Any], length: int) -> bool:
    """Whether the caches end at a length, so that a snapshot of them belongs to it."""
    used = [cache for cache in leaves(caches) if not cache.empty()]
    return all(getattr(cache, "offset", length) == length for cache in used)


def whole_at(caches: Sequence[Any], length: int) -> bool:
    """Whether all that the first ``length`` tokens need can be cut out of caches of one row."""
    packed = [cache for cache in leaves(caches) if isinstance(cache, PackedKVCache)]
    return all(kept.last_at(cache, length) is not None for cache in packed)


def rewind(caches: Sequence[Any], length: int) -> int:
    """Trim caches that do not know their last tokens to the end of a block, where they do.

    So what is computed behind them is what would be computed behind the whole prompt.

    Args:
        caches: One row's, which mlx-lm may have trimmed.
        length: Tokens that they hold.

    Returns:
        Tokens that they hold then; 0 if they are of no use.
    """
    packed = [cache for cache in leaves(caches) if isinstance(cache, PackedKVCache)]
    vague = [cache for cache in packed if kept.last_at(cache, length) is None]
    if not vague:
        return length
    places = set.intersection(*(kept.places(cache) for cache in vague))
    place = max((each for each in places if each < length), default=0)
    if not place or not all(cache.is_trimmable() for cache in leaves(caches)):
        return 0
    for cache in leaves(caches):
        cache.trim(length - place)
    return place


def cut(key: str, caches: Sequence[Any], start: int, stop: int, *, snapshot: bool = False) -> Piece:
    """The tokens of a range of a prompt cache, which may go on meanwhile.

    Args:
        key: The block's key.
        caches: One row's caches.
        start: The first token.
        stop: The token behind the last one.
        snapshot: Whether to add the state of all other layers, which is that at ``stop``.
    """
    arrays: dict[str, mx.array] = {}
    notes: dict[str, Any] = {"tokens": stop - start}
    for number, cache in enumerate(leaves(caches)):
        if cache.empty():
            continue
        if per_token(cache):
            for place, plane in enumerate(planes(cache) if stop > start else ()):
                arrays[f"{number}.{place}.keys"] = plane.keys[:, :, start:stop]
                arrays[f"{number}.{place}.values"] = plane.values[:, :, start:stop]
        elif snapshot:
            states = [
                _packed(p.state, f"{number}.{i}", arrays) for i, p in enumerate(planes(cache))
            ]
            notes[f"{number}.states"] = states
        else:
            continue
        if isinstance(cache, PackedKVCache):
            notes[f"{number}.layer"] = {"dims": cache.dims, "dtype": cache.dtype}
            places = {stop, *(each for each in kept.places(cache) if start < each < stop)}
            for place in sorted(places):
                last = kept.last_at(cache, place) or kept.Sides()
                for name, side in last._asdict().items():
                    if side is not None:
                        arrays[f"{number}.last.{stop - place}.{name}"] = side
            if cache.residuals is not None and start == 0:
                arrays[f"{number}.residuals"] = cache.residuals
    mx.eval(arrays)
    return Piece(key, {name: held(array) for name, array in arrays.items()}, notes)


def join(caches: Sequence[Any], pieces: Sequence[Piece], length: int) -> None:
    """Fill new caches with consecutive blocks; the last piece holds the snapshots, if any.

    Args:
        caches: One row's caches.
        pieces: The blocks; the last one may go on behind the tokens that are taken.
        length: How many tokens to take.

    Raises:
        InputError: The pieces do not fit each other.
    """
    total = sum(piece.notes["tokens"] for piece in pieces)
    if total < length:
        raise InputError(f"{_MISFIT}: they do not have {length} tokens")
    last = pieces[-1]
    for number, cache in enumerate(leaves(caches)):
        if isinstance(cache, PackedKVCache):
            _describe(cache, number, pieces)
        if per_token(cache):
            for place, plane in enumerate(planes(cache)):
                keys = _along(pieces, f"{number}.{place}.keys", total)
                values = _along(pieces, f"{number}.{place}.values", total)
                if (keys is None) is not (values is None):
                    raise InputError(f"{_MISFIT}: one lacks values")
                if keys is not None and values is not None:
                    plane.keys, plane.values = keys[:, :, :length], values[:, :, :length]
                    plane.offset = length
        elif f"{number}.states" in last.notes:
            for plane, state in zip(planes(cache), last.notes[f"{number}.states"], strict=True):
                plane.state = _unpacked(state, last)
        if isinstance(cache, PackedKVCache) and kept.keeps_last(cache) and not cache.empty():
            _take_up(cache, number, pieces, length)
    mx.eval([cache.state for cache in caches if not cache.empty()])


def _describe(cache: PackedKVCache, number: int, pieces: Sequence[Piece]) -> None:
    known = [p.notes[f"{number}.layer"] for p in pieces if f"{number}.layer" in p.notes]
    if not known:
        return
    if any(each != known[0] for each in known):
        raise InputError(f"{_MISFIT}: they have different dimensions")
    dims = tuple(known[0]["dims"])
    cache.dims, cache.dtype = (dims[0], dims[1]), known[0]["dtype"]
    cache.formats = cache.formats.fitted(*dims)
    own = pieces[0].arrays.get(f"{number}.residuals")
    cache.residuals = None if own is None else restored(*own)


def knows(caches: Sequence[Any], pieces: Sequence[Piece], length: int) -> bool:
    """Whether consecutive blocks hold the last tokens of so many, where new caches need them."""
    return all(
        length in _ends(number, pieces)
        for number, cache in enumerate(leaves(caches))
        if isinstance(cache, PackedKVCache)
        and kept.keeps_last(cache)
        and any(f"{number}.layer" in piece.notes for piece in pieces)
    )


def _ends(number: int, pieces: Sequence[Piece]) -> dict[int, kept.Sides]:
    """Length -> the last tokens of one layer, of consecutive blocks."""
    found: dict[int, kept.Sides] = {}
    stop = 0
    for piece in pieces:
        stop += piece.notes["tokens"]
        for name, array in piece.arrays.items():
            match name.split("."):
                case [own, "last", place, side] if own == str(number):
                    length = stop - int(place)
                    known = found.get(length, kept.Sides())
                    found[length] = known._replace(**{side: restored(*array)})
    return found


def _take_up(cache: PackedKVCache, number: int, pieces: Sequence[Piece], length: int) -> None:
    """Give a filled cache the last tokens of each place where they are known."""
    ends = {place: sides for place, sides in _ends(number, pieces).items() if place <= length}
    if not kept.fits(cache, ends.get(length)):
        raise InputError(f"{_MISFIT}: one lacks its last tokens")
    kept.take_up(cache, length, ends)


def _along(pieces: Sequence[Piece], name: str, length: int) -> mx.array | None:
    """The parts of one array, one behind another; None if no piece has any."""
    parts = [restored(*piece.arrays[name]) for piece in pieces if name in piece.arrays]
    if not parts:
        return None
    shapes = {(*p.shape[:2], *p.shape[3:], str(p.dtype)) for p in parts}
    if len(shapes) > 1 or sum(part.shape[2] for part in parts) != length:
        raise InputError(f"{_MISFIT}: their arrays have different shapes")
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


def _packed(state: Any, name: str, arrays: dict[str, mx.array]) -> Any:
    """A state as JSON, with names in place of its arrays."""
    if isinstance(state, mx.array):
        own = f"{name}.{len(arrays)}"
        arrays[own] = state
        return {"array": own}
    if isinstance(state, list | tuple):
        return [_packed(each, name, arrays) for each in state]
    return state


def _unpacked(state: Any, piece: Piece) -> Any:
    if isinstance(state, Mapping):
        return restored(*piece.arrays[state["array"]])
    return [_unpacked(each, piece) for each in state] if isinstance(state, list) else state


def _rows(cache: Any) -> int:
    found = [value for _, value in tree_flatten(planes(cache)[0].state)]
    return next((value.shape[0] for value in found if isinstance(value, mx.array)), 1)
