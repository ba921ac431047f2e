"""A per-layer cache that keeps keys and values packed.

mlx-lm's own caches manage positions: growth, sliding windows, batches with padding, trimming,
merging. They move whole rows and never read them. So they can hold the packed rows of a layer: one
cache for each part of the formats (codes, scales, biases), as GPU kernels need them, or a single
cache of interleaved rows on a CPU, where each operation on an array takes longer than the copy.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..kernels import Platform, current
from . import transform_file
from .encoding import Rows, encode, layout_of, packed_of, planes_of
from .first_keys import KEEPING, FirstKeys, found, joined
from .packed_array import Packed
from .plan import LayerFormat
from .plane_state import described, restore, storable, transformed
from .recent import LastTokens, Recent, together

#: What queries see of the last keys and values.
Seen = Sequence[Recent | None]

#: Attributes of a cache that models and mlx-lm read, taken from the first plane.
_READ = ("offset", "left_padding", "max_size", "keep", "chunk_size", "start_position", "_idx")


class PackedKVCache:
    """Packed keys and values of one layer; replaces one of mlx-lm's caches.

    Attributes:
        planes: mlx-lm caches with equal positions. If there are several, plane ``i`` holds part
            ``i`` of keys and values; a single one holds all parts, in 32-bit words.
        formats: Formats of keys and values, fitted to their dimensions once these are known.
        layout: How parts lie in the planes, one of `encoding.LAYOUTS`.
        dims: Head dimensions of keys and values; None before there are any.
        dtype: Name of the unpacked dtype; None before there is one.
        dense: Whether attention gets plain arrays, for models that compute attention themselves.
        mergeable: Whether mlx-lm's batch engine may merge it with others.
        platform: Where keys and values are packed and attended to; None for where MLX's default
            device is.
        layer: The decoder layer that writes to it; None if that is not known.
        residuals: What the first keys of each row differ by from what is packed, see `FirstKeys`;
            None before there are any, or if none are kept.
        complete: Whether all of them are known to be there.
        last: The last keys and values of each row as they were computed; None if they are not kept,
            or must be found in what is packed.
    """

    def __init__(
        self,
        cache: Any,
        formats: LayerFormat,
        *,
        dense: bool = False,
        mergeable: bool = True,
        interleaved: bool | None = None,
        stacked: bool = False,
        platform: Platform | None = None,
        layer: int | None = None,
    ):
        """Replace an empty mlx-lm cache.

        ``interleaved`` keeps all parts of a position in one row, if the formats allow it; None
        decides by the platform. ``stacked`` keeps keys and values of equal dimensions and formats
        in two arrays, where kernels of our own read them.
        """
        from copy import deepcopy

        where = platform or current()
        if interleaved is None:
            interleaved = where.name == "cpu"
        stacked = stacked and where.compile is not None
        self.layout = layout_of(formats, interleaved=interleaved, stacked=stacked)
        count = planes_of(formats, self.layout)
        self.planes: list[Any] = [cache, *(deepcopy(cache) for _ in range(count - 1))]
        self.formats = formats
        self.dims: tuple[int, int] | None = None
        self.dtype: str | None = None
        self.dense = dense
        self.mergeable = mergeable
        self.platform = platform
        self.layer = layer
        self.residuals: mx.array | None = None
        self.complete = False
        self.last: LastTokens | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Append keys and values (batch, heads, length, dim); returns all keys and values.

        Raises:
            UnsupportedError: The head dimension does not fit the format.
        """
        if self.dims is None:
            dims = keys.shape[-1], values.shape[-1]
            self.formats = self.formats.fitted(*dims)
            self.dims, self.dtype = dims, str(keys.dtype).rpartition(".")[2]
        rows = encode(keys, values, self.formats, self.platform or current(), self.layout)
        if not self.complete:
            self._keep_first(keys, rows)
        seen = self._keep_last(keys, values)
        pairs = zip(self.planes, rows, strict=True)
        return self._views([plane.update_and_fetch(*pair) for plane, pair in pairs], seen)

    def _keep_last(self, keys: mx.array, values: mx.array) -> Seen:
        """Keep the last tokens; returns what the new queries see of them."""
        count = self.formats.recent_tokens
        if not count or self.dense or type(self.planes[0]).__name__ not in KEEPING:
            return (None, None)
        formats = (self.formats.keys, self.formats.values)
        last = self.last or LastTokens(count)
        self.last, seen = last.updated((keys, values), formats, self._packed_last)
        return seen

    def _found_last(self, count: int) -> LastTokens:
        """The last tokens as they are packed."""
        sides = [self._packed_last(side) for side in range(2)]
        whole = [side is not None and side.shape[2] == count for side in sides]
        return LastTokens(count, tuple(s if w else None for s, w in zip(sides, whole, strict=True)))

    def _packed_last(self, side: int) -> mx.array | None:
        """The last keys (0) or values (1) as far as they are packed, in the stored basis."""
        if self.empty():
            return None
        packed = self.keys_and_values()[side]
        return packed[:, :, -self.formats.recent_tokens :].stored() if packed.shape[2] else None

    def _keep_first(self, keys: mx.array, rows: Rows) -> None:
        """Keep what the first keys of a row lost, if some are among those that come."""
        count, format = self.formats.sink_tokens, self.formats.keys
        if not count or format is None or type(self.planes[0]).__name__ not in KEEPING:
            self.complete = True
        elif keys.shape[2]:
            offset = self.planes[0].offset
            least = offset if isinstance(offset, int) else int(offset.min())
            self.complete = least >= count
            if not self.complete:
                packed = packed_of(rows, self.formats, self.dtype, self.layout)[0]
                assert isinstance(packed, Packed)
                self.residuals = found(self.residuals, keys, packed.parts, format, offset, count)

    def keys_and_values(self) -> tuple[Any, Any]:
        """All keys and values, for attention."""
        return self._views([plane.keys_and_values() for plane in self.planes])

    def _views(
        self, rows: list[tuple[mx.array, mx.array]], seen: Seen = (None, None)
    ) -> tuple[Any, Any]:
        first = None
        if self.residuals is not None:
            first = FirstKeys(self.residuals, getattr(self.planes[0], "left_padding", None))
        keys, values = packed_of(rows, self.formats, self.dtype, self.layout, first, self.platform)
        for side, recent in zip((keys, values), seen, strict=True):
            if isinstance(side, Packed):
                side.recent = recent
        if not self.dense:
            return keys, values
        return _plain(keys), _plain(values)

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        """The attention mask, made by mlx-lm's cache."""
        return self.planes[0].make_mask(*args, **kwargs)

    def maybe_trim_front(self) -> None:
        """Drop positions before the current chunk, for chunked attention."""
        for plane in self.planes:
            plane.maybe_trim_front()

    def is_trimmable(self) -> bool:
        """Whether the last tokens can be removed."""
        return self.planes[0].is_trimmable()

    def trim(self, n: int) -> int:
        """Remove the last ``n`` tokens; returns the number removed."""
        taken = [plane.trim(n) for plane in self.planes]
        self.complete = False
        if taken[0]:
            self.last = None
        return taken[0]

    def size(self) -> int:
        """Number of tokens in the cache."""
        return self.planes[0].size()

    def empty(self) -> bool:
        """Whether the cache is still empty."""
        return self.planes[0].keys is None

    @property
    def keys(self) -> mx.array | None:
        """Codes of the keys as stored; models set this only to order evaluation."""
        return self.planes[0].keys

    @keys.setter
    def keys(self, value: mx.array) -> None:
        self.planes[0].keys = value

    @property
    def values(self) -> mx.array | None:
        """Codes of the values as stored."""
        return self.planes[0].values

    @property
    def heads(self) -> int:
        """Heads of the keys; none before there are any."""
        stored = 0 if self.keys is None else self.keys.shape[1]
        return stored // 2 if self.layout == "stacked" else stored

    @property
    def nbytes(self) -> int:
        """Stored bytes, including allocated but unused room."""
        arrays = [array for plane in self.planes for array in (plane.keys, plane.values)]
        arrays += [self.residuals, *(self.last.arrays if self.last else ())]
        return sum(array.nbytes for array in arrays if array is not None)

    def filter(self, batch_indices: Any) -> None:
        """Keep these rows of the batch."""
        for plane in self.planes:
            plane.filter(batch_indices)
        if self.residuals is not None:
            self.residuals = self.residuals[mx.array(batch_indices)]
        self.last = self.last and self.last.rows(mx.array(batch_indices))

    def extend(self, other: "PackedKVCache") -> None:
        """Append another batch's rows."""
        self.residuals = joined([(each.residuals, each._rows) for each in (self, other)])
        self.last = _together((self, other))
        self.complete = self.complete and other.complete
        for plane, others in zip(self.planes, other.planes, strict=True):
            plane.extend(others)
        self._learn(other)

    def extract(self, index: int) -> "PackedKVCache":
        """One row of the batch as a cache of its own."""
        row = self._with([plane.extract(index) for plane in self.planes])
        if self.residuals is not None:
            row.residuals = self.residuals[index : index + 1]
        row.last = self.last and self.last.rows(slice(index, index + 1))
        return row

    def prepare(self, **kwargs: Any) -> None:
        """Prepare for a padded prompt, as mlx-lm's batch caches do."""
        if self.formats.recent_tokens and max(kwargs.get("right_padding") or [0]) > 0:
            last = self.last or LastTokens(self.formats.recent_tokens)
            self.last = replace(last, ahead=tuple(kwargs["lengths"]))
        for plane in self.planes:
            plane.prepare(**kwargs)

    def finalize(self) -> None:
        """Finish a padded prompt, as mlx-lm's batch caches do."""
        for plane in self.planes:
            plane.finalize()
        self.last = self.last and replace(self.last, ahead=None)
        self.complete = False  # what was padding may be followed by first tokens

    def _merge(self, caches: Sequence["PackedKVCache"]) -> "PackedKVCache":
        merged = self._with(
            [self.planes[i].merge([c.planes[i] for c in caches]) for i in range(len(self.planes))]
        )
        for cache in caches:
            merged._learn(cache)
        merged.residuals = joined([(cache.residuals, cache._rows) for cache in caches])
        merged.last = _together(caches)
        merged.complete = all(cache.complete for cache in caches)
        return merged

    @property
    def _rows(self) -> int:
        """Rows of a batch; an empty cache counts as one."""
        padding = getattr(self.planes[0], "left_padding", None)
        if padding is not None:
            return len(padding)
        return 1 if self.planes[0].keys is None else self.planes[0].keys.shape[0]

    def _learn(self, other: "PackedKVCache") -> None:
        """Copy formats, dimensions and dtype from another cache if this one is empty."""
        if self.dims is None:
            self.formats, self.dims, self.dtype = other.formats, other.dims, other.dtype

    def _with(self, planes: list[Any]) -> "PackedKVCache":
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, planes=planes)
        return other

    def __getattr__(self, name: str) -> Any:
        # mlx-lm tests with hasattr whether a cache can join a batch.
        planes = self.__dict__.get("planes")
        if planes and name == "merge" and self.mergeable and hasattr(planes[0], "merge"):
            return self._merge
        if planes and name in _READ:
            return getattr(planes[0], name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def state(self) -> Any:
        """The state that mlx-lm evaluates and saves."""
        from mlx_optiq_compat import symbols

        states = [storable(plane.state) for plane in self.planes]
        keys = transformed(self.formats)
        if keys is not None and keys.transform is not None:
            states.append(transform_file.stored(keys.transform))
        if self.residuals is not None:
            states.append([self.residuals])
        if self.last is not None and self.last.arrays:
            states.append(self.last.arrays)
        if symbols.cache_has_meta_state(self.planes[0]):
            return states
        return [states, described(self)]

    @state.setter
    def state(self, value: Any) -> None:
        states, description = value
        restore(self, states, None, description)

    @property
    def meta_state(self) -> Any:
        """Settings that mlx-lm before 0.32 saves beside the arrays."""
        return [described(self), [plane.meta_state for plane in self.planes]]

    @classmethod
    def from_state(cls, state: Any, meta_state: Any = None) -> "PackedKVCache":
        """Rebuild a cache from `state` and, before mlx-lm 0.32, `meta_state`."""
        cache = object.__new__(cls)
        if meta_state is None:
            cache.state = state
        else:
            description, metas = meta_state
            restore(cache, state, metas, description)
        return cache


def _together(caches: Sequence[PackedKVCache]) -> LastTokens | None:
    """The last tokens of several caches, one behind the other; None if none keeps any."""
    count = max(cache.formats.recent_tokens for cache in caches)
    if not count or all(cache.last is None for cache in caches):
        return None
    return together([(cache.last or cache._found_last(count), cache._rows) for cache in caches])


def _plain(array: Packed | mx.array) -> mx.array:
    return array.plain() if isinstance(array, Packed) else array
