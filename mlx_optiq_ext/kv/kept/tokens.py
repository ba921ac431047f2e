"""What a `PackedKVCache` keeps as it was computed: the first keys, and the last keys and values."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..encoding import Rows, packed_of
from ..packed_array import Packed
from . import first_keys, last_tokens
from .first_keys import FirstKeys
from .last_tokens import LastTokens, Marks, Row, Sides
from .recent import Recent, spans, taken

#: What new queries see of the last keys and of the last values.
Seen = Sequence[Recent | None]


def keep_first(cache: Any, keys: mx.array, rows: Rows) -> None:
    """Keep what the first keys of a row lost, if some are among those that come."""
    count, format = cache.formats.sink_tokens, cache.formats.keys
    if not count or format is None or _name(cache) not in first_keys.KEEPING:
        cache.complete = True
    elif keys.shape[2]:
        offset = cache.planes[0].offset
        least = offset if isinstance(offset, int) else int(offset.min())
        cache.complete = least >= count
        if not cache.complete:
            packed = packed_of(rows, cache.formats, cache.dtype, cache.layout)[0]
            assert isinstance(packed, Packed)
            cache.residuals = first_keys.found(
                cache.residuals, keys, packed.parts, format, offset, count
            )


def keeps_last(cache: Any) -> bool:
    """Whether a cache keeps its last tokens."""
    packs = cache.formats.keys or cache.formats.values
    known = _name(cache) in last_tokens.KEEPING
    return bool(cache.formats.recent_tokens and packs and known and not cache.dense)


def last_of(cache: Any) -> LastTokens | None:
    """The last tokens of a cache, unpacked where they are known no more; None of an empty one."""
    if cache.last is not None and cache.last.sides.arrays:
        return cache.last
    if not keeps_last(cache) or cache.empty():
        return cache.last
    count, plane = cache.formats.recent_tokens, cache.planes[0]
    end = end_of(plane)
    at = spans(end, 0, end, count)
    first = None
    if cache.residuals is not None:
        starts = getattr(plane, "left_padding", None)
        first = FirstKeys(
            cache.residuals, (mx.array([0]) if starts is None else starts) - at[0].start
        )
    rows = [(taken(p.keys, at, axis=-2), taken(p.values, at, axis=-2)) for p in cache.planes]
    packed = packed_of(rows, cache.formats, cache.dtype, cache.layout, first)
    sides = (_padded(side.stored(), count) if isinstance(side, Packed) else None for side in packed)
    return LastTokens(count, Sides(*sides), cache.last and cache.last.ahead)


def _padded(last: mx.array, count: int) -> mx.array:
    return mx.pad(last, [(0, 0), (0, 0), (count - last.shape[2], 0), (0, 0)])


def keep_last(cache: Any, keys: mx.array, values: mx.array) -> Sides:
    """Keep the last tokens, with those that come.

    Returns:
        Known and new ones in a row, (batch, heads, count + length, dim), for `seen_of`.
    """
    length = keys.shape[2]
    if not length or not keeps_last(cache):
        return Sides()
    if cache.marks is not None and not (cache.last and cache.last.sides.arrays):
        cache.marks = cache.marks.refilled()
    last = last_of(cache) or LastTokens(cache.formats.recent_tokens)
    found, whole = last.with_new((keys, values), (cache.formats.keys, cache.formats.values))
    if cache.marks is not None:
        cache.marks, new = cache.marks.with_new(whole, length, last.ahead)
        if new:  # they are evaluated with what mlx-lm evaluates
            held = iter(mx.depends(found.sides.arrays, new))
            sides = Sides(*(s if s is None else next(held) for s in found.sides))
            found = replace(found, sides=sides)
    cache.last = found
    return whole


def seen_of(cache: Any, whole: Sides) -> Seen:
    """What the queries of tokens that came last see of keys and of values."""
    if not whole.arrays:
        return None, None
    count, plane = cache.formats.recent_tokens, cache.planes[0]
    end, floor = None, 0
    if "Rotating" in type(plane).__name__:
        if whole.arrays[0].shape[2] == count + 1:
            end = plane._idx
        # Only windows of a single sequence keep its first tokens.
        keep = getattr(plane, "keep", 0)
        floor = keep if keep and plane.offset > plane.keys.shape[2] else 0
    return [side if side is None else Recent(side, count, end, floor) for side in whole]


def end_of(plane: Any) -> int:
    """Where the newest token ends in the arrays of one of mlx-lm's caches."""
    if hasattr(plane, "_idx"):
        return plane._idx
    return plane.offset - getattr(plane, "start_position", 0)


def expect(cache: Any, lengths: Sequence[int]) -> None:
    """Prepare for a prompt padded on the right, which has so many tokens of each row."""
    if keeps_last(cache):
        last = last_of(cache) or LastTokens(cache.formats.recent_tokens)
        cache.last = replace(last, ahead=tuple(lengths))


def unite(cache: Any, caches: Sequence[Any]) -> None:
    """Give a cache what several keep whose rows it takes."""
    cache.residuals = first_keys.joined([(each.residuals, each.rows) for each in caches])
    marks = [(each.marks, each.rows) for each in caches]
    last = [(last_of(each), each.rows) for each in caches]
    cache.last, cache.marks = last_tokens.together(last), last_tokens.marks_of(marks)
    cache.complete = all(each.complete for each in caches)


def take_rows(cache: Any, whole: Any, index: list[int]) -> None:
    """Give a cache what another keeps of some rows."""
    if whole.residuals is not None:
        cache.residuals = whole.residuals[mx.array(index, mx.int32)]
    cache.last = whole.last and whole.last.rows(index)
    cache.marks = whole.marks and whole.marks.of(index)


def trimmed(cache: Any, count: int) -> None:
    """Forget the last tokens of a cache that lost some; at the end of a block they are known."""
    cache.complete, cache.last = False, None
    if cache.marks is None:
        return
    cache.marks = cache.marks.trimmed(count)
    if len(cache.marks.rows) == 1:
        row = cache.marks.rows[0]
        if (sides := row.ends.get(row.length)) is not None:
            cache.last = LastTokens(cache.formats.recent_tokens, sides)


def mark_ends(cache: Any, every: int) -> None:
    """Have a new cache keep what stands before each multiple of ``every`` tokens."""
    if keeps_last(cache):
        cache.marks = Marks(every, (Row(),) * cache.rows)


def last_at(cache: Any, length: int) -> Sides | None:
    """The last tokens of the first ``length`` of a cache of one row, as they were computed.

    None if they are not known; nothing of a cache that keeps none.
    """
    if not keeps_last(cache) or cache.empty():
        return Sides()
    if cache.marks is None:
        return None
    row = cache.marks.rows[0]
    if row.exact and row.length == length and cache.last is not None:
        return cache.last.sides
    return row.ends.get(length)


def places(cache: Any) -> set[int]:
    """Lengths of a cache of one row whose last tokens are known."""
    return set() if cache.marks is None else set(cache.marks.rows[0].ends)


def fits(cache: Any, last: Sides | None) -> bool:
    """Whether these are the last tokens of a filled cache of one row, as far as shapes say."""
    if last is None or cache.dims is None:
        return False
    formats = (cache.formats.keys, cache.formats.values)
    shapes = [(1, cache.heads, cache.formats.recent_tokens, dim) for dim in cache.dims]
    wanted = [shape if format else None for shape, format in zip(shapes, formats, strict=True)]
    return [side if side is None else side.shape for side in last] == wanted


def take_up(cache: Any, length: int, ends: Mapping[int, Sides]) -> None:
    """Give a cache of one row that was filled from elsewhere its last tokens.

    Args:
        cache: It, filled with ``length`` tokens.
        length: Tokens.
        ends: As `Row.ends`, with those of all tokens.
    """
    cache.last = LastTokens(cache.formats.recent_tokens, ends[length])
    if cache.marks is not None:
        cache.marks = replace(cache.marks, rows=(Row(length, True, ends),))


def _name(cache: Any) -> str:
    return type(cache.planes[0]).__name__
