"""The state of a packed cache and its planes, in a form that every mlx-lm and MLX can save."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx

from .. import files
from ..errors import InputError
from . import transform_file
from .encoding import LAYOUTS, layout_of, planes_of, rows_of
from .formats import Affine, KeyTransform, from_json, to_json
from .kept.last_tokens import LastTokens, Sides
from .plan import MOST_RECENT, MOST_SINKS, LayerFormat

_AGAIN = "save the prompt cache again"


#: Types that can be packed, and the largest head dimension.
DTYPES, WIDEST = ("float32", "float16", "bfloat16"), 1 << 16


def described(cache: Any) -> str:
    """What `restore` needs to know of a packed cache beside its arrays."""
    sides = {"keys": cache.formats.keys, "values": cache.formats.values}
    keys = transformed(cache.formats)
    return json.dumps(
        {
            "cache": type(cache.planes[0]).__name__,
            "layout": cache.layout,
            **{side: format and to_json(format) for side, format in sides.items()},
            "dims": cache.dims,
            "dtype": cache.dtype,
            "dense": cache.dense,
            "mergeable": cache.mergeable,
            "layer": cache.layer,
            "sink_tokens": cache.formats.sink_tokens,
            "recent_tokens": cache.formats.recent_tokens,
            "recent": cache.last is not None and bool(cache.last.sides.arrays),
            "transform": keys is not None and keys.transform is not None,
            "residuals": cache.residuals is not None,
        }
    )


def restore(cache: Any, states: Any, metas: Any, description: str) -> None:
    """Give a cache what was saved of another.

    Args:
        cache: A new one.
        states: Of its planes, centre and basis of its keys' transform and residuals of its first
            keys, if it has them.
        metas: Settings of each plane, before mlx-lm 0.32.
        description: From `described`.

    Raises:
        InputError: They do not belong together; the message says which part does not.
    """
    from mlx_lm.models import cache as caches

    where = "saved prompt cache"
    found = files.Fields.of(files.parse_json(description, where, files.REQUEST), where)
    kind: Any = vars(caches).get(found.text("cache"))
    if not (isinstance(kind, type) and kind.__module__ == caches.__name__):
        raise found.refusal("cache", "one of this mlx-lm's own")
    sides = (found.table(side, None) for side in ("keys", "values"))
    keys, values = (side and from_json(side.entry, side.where) for side in sides)
    sinks = found.integer("sink_tokens", 0, MOST_SINKS, default=0)
    near = found.integer("recent_tokens", 0, MOST_RECENT, default=0)
    cache.formats = LayerFormat(keys, values, sinks, near)
    cache.dims, cache.dtype = None, found.choice("dtype", (*DTYPES, None))
    if (dims := found.items("dims", None)) is not None:
        pair = files.Fields(dict(zip(("keys", "values"), dims, strict=False)), f"{where}: dims")
        cache.dims = pair.integer("keys", 1, WIDEST), pair.integer("values", 1, WIDEST)
    if cache.dims is not None:
        cache.formats = cache.formats.fitted(*cache.dims)
    cache.dense, cache.mergeable = found.flag("dense"), found.flag("mergeable")
    cache.platform, cache.layer = None, found.integer("layer", default=None)
    cache.residuals, cache.complete, cache.last, cache.marks = None, False, None, None
    if found.flag("recent", default=False):
        states, arrays = states[:-1], states[-1]
        cache.last = _last(arrays, cache.formats)
    if found.flag("residuals", default=False):
        states, arrays = states[:-1], states[-1]
        cache.residuals = _residuals(arrays)
    if found.flag("transform", default=False):
        if transformed(cache.formats) is None:
            raise found.refusal("transform", "that of a format of transformed keys")
        states, arrays = states[:-1], states[-1]
        cache.formats = cache.formats.with_transform(_transform(arrays, where))
    states = [restored(state, states[0]) for state in states]
    if metas is None:
        cache.planes = [kind.from_state(state) for state in states]
    else:
        cache.planes = [kind.from_state(*pair) for pair in zip(states, metas, strict=True)]
    count, rows = len(cache.planes), None
    cache.layout = found.choice("layout", LAYOUTS)
    wanted = layout_of(
        cache.formats,
        interleaved=cache.layout == "interleaved",
        stacked=cache.layout == "stacked" and (cache.dims is None or len(set(cache.dims)) == 1),
    )
    if cache.layout != wanted or count != planes_of(cache.formats, cache.layout):
        raise found.refusal("keys", f"a format of {count} arrays a vector")
    if cache.dims is not None:
        dtype = found.choice("dtype", DTYPES)
        rows = rows_of(cache.dims, dtype, cache.formats, cache.layout)
    check_rows(cache.planes, rows)
    heads = [array.shape[1] for array in (cache.keys, cache.values) if array is not None]
    if cache.layout == "stacked" and any(each % 2 or each != heads[0] for each in heads):
        raise InputError(f"a packed layer lacks the heads of its values: {_AGAIN}")
    if cache.residuals is not None:
        rows = (cache.keys.shape[0], cache.heads) if cache.keys is not None else (0, 0)
        if cache.residuals.shape != (*rows, sinks, (cache.dims or (0, 0))[0]):
            raise InputError(f"a packed layer's first keys are of another shape: {_AGAIN}")
    if cache.last is not None:
        rows = None if cache.keys is None else (cache.keys.shape[0], cache.heads)
        for side, dim in zip(cache.last.sides, cache.dims or (), strict=False):
            if rows is None or (side is not None and side.shape != (*rows, near, dim)):
                raise InputError(f"a packed layer's last tokens are of another shape: {_AGAIN}")
    turned = transformed(cache.formats)
    if turned is not None and turned.transform is None and cache.keys is not None:
        raise InputError(f"a packed layer lacks the transform of its keys: {_AGAIN}")
    if turned is not None and turned.transform is not None and cache.keys is not None:
        has, wants = (
            (cache.heads, cache.dims and cache.dims[0]),
            turned.transform.basis.shape,
        )
        if has != wants[:2]:
            raise InputError(f"a packed layer's transform is for other keys: {_AGAIN}")


def transformed(formats: LayerFormat) -> Affine | None:
    """The format of a layer's keys if they are transformed."""
    keys = formats.keys
    return keys if isinstance(keys, Affine) and keys.transformed else None


def _transform(arrays: Any, where: str) -> KeyTransform:
    found = list(arrays) if isinstance(arrays, list | tuple) else []
    if len(found) != 2 or not all(isinstance(array, mx.array) for array in found):
        raise InputError(f"a packed layer lacks the transform of its keys: {_AGAIN}")
    return transform_file.restored(found, where)


def _residuals(arrays: Any) -> mx.array:
    found = list(arrays) if isinstance(arrays, list | tuple) else []
    if len(found) != 1 or not isinstance(found[0], mx.array) or found[0].ndim != 4:
        raise InputError(f"a packed layer lacks its first keys: {_AGAIN}")
    if not bool(mx.isfinite(found[0]).all()):
        raise InputError(f"a packed layer's first keys are not finite: {_AGAIN}")
    return found[0]


def _last(arrays: Any, formats: LayerFormat) -> LastTokens:
    found = list(arrays) if isinstance(arrays, list | tuple) else []
    packed = [side is not None for side in (formats.keys, formats.values)]
    if len(found) != sum(packed) or not all(map(_is_rows, found)):
        raise InputError(f"a packed layer lacks its last tokens: {_AGAIN}")
    if not all(bool(mx.isfinite(array).all()) for array in found):
        raise InputError(f"a packed layer's last tokens are not finite: {_AGAIN}")
    own = iter(found)
    return LastTokens(formats.recent_tokens, Sides(*(next(own) if has else None for has in packed)))


def storable(state: Any) -> Any:
    """A plane's state with placeholders for arrays of zero width, which old MLX cannot save."""
    if not isinstance(state, list | tuple):
        return state
    return [mx.zeros((1,), a.dtype) if _is_rows(a) and a.shape[-1] == 0 else a for a in state]


def restored(state: Any, first: Any) -> Any:
    """Undo `storable`; the shapes are taken from the first plane, whose arrays have widths."""
    if not isinstance(state, list | tuple):
        return state
    if any(isinstance(part, dict) for part in state):  # MLX fills gaps in a list with these
        raise InputError(f"a packed layer lacks arrays: {_AGAIN}")
    return [
        mx.zeros((*like.shape[:3], 0), a.dtype) if _is_rows(like) and a.ndim == 1 else a
        for a, like in zip(state, first, strict=True)
    ]


def check_rows(planes: Sequence[Any], rows: Iterable[tuple[mx.array, mx.array]] | None) -> None:
    """Refuse planes that do not hold what a layer's formats write.

    Args:
        planes: A packed cache's, in order.
        rows: What one position takes in each, see `encoding.rows_of`; None where nothing was held.

    Raises:
        InputError: An array is missing, or has another shape or dtype; the message says which.
    """
    if rows is None:
        if any(array is not None for plane in planes for array in (plane.keys, plane.values)):
            raise InputError(f"a packed layer does not say its dims: {_AGAIN}")
        return
    first = planes[0].keys, planes[0].values
    offsets = {plane.offset for plane in planes if isinstance(plane.offset, int)}
    for plane, row in zip(planes, rows, strict=True):
        for side, array, one, like in zip(
            ("keys", "values"), (plane.keys, plane.values), row, first, strict=True
        ):
            if not _is_rows(array) or not _is_rows(first[0]) or not _is_rows(like):
                raise InputError(f"a packed layer lacks {side}: {_AGAIN}")
            wanted = (first[0].shape[0], like.shape[1], first[0].shape[2], one.shape[-1])
            if array.shape != wanted or array.dtype != one.dtype:
                raise InputError(
                    f"the {side} of a packed layer are {array.dtype} {array.shape} where its "
                    f"format has {one.dtype} {wanted}: {_AGAIN}"
                )
    length = first[0].shape[2] if type(planes[0]).__name__ == "KVCache" else math.inf
    if len(offsets) > 1 or any(not 0 <= offset <= length for offset in offsets):
        raise InputError(f"a packed layer ends at {files.shown(max(offsets))}: {_AGAIN}")


def _is_rows(array: Any) -> bool:
    return isinstance(array, mx.array) and array.ndim == 4
