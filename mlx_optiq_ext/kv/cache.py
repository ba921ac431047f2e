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
from .encoding import encode, layout_of, packed_of, planes_of
from .kept import tokens as kept_tokens
from .kept.first_keys import FirstKeys
from .kept.last_tokens import LastTokens, Marks
from .kept.tokens import Seen
from .packed_array import Packed
from .plan import LayerFormat
from .plane_state import described, restore, storable, transformed

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
        marks: The same at the ends of blocks; None if none are kept there.
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
        self.marks: Marks | None = None

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
            kept_tokens.keep_first(self, keys, rows)
        whole = kept_tokens.keep_last(self, keys, values)
        pairs = zip(self.planes, rows, strict=True)
        held = [plane.update_and_fetch(*pair) for plane, pair in pairs]
        return self._views(held, kept_tokens.seen_of(self, whole))

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
            kept_tokens.trimmed(self, taken[0])
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
        arrays += [self.residuals, *(self.last.sides.arrays if self.last else ())]
        arrays += self.marks.arrays if self.marks else ()
        return sum(array.nbytes for array in arrays if array is not None)

    def filter(self, batch_indices: Any) -> None:
        """Keep these rows of the batch."""
        for plane in self.planes:
            plane.filter(batch_indices)
        kept_tokens.take_rows(self, self, [int(each) for each in batch_indices])

    def extend(self, other: "PackedKVCache") -> None:
        """Append another batch's rows."""
        kept_tokens.unite(self, (self, other))
        for plane, others in zip(self.planes, other.planes, strict=True):
            plane.extend(others)
        self._learn(other)

    def extract(self, index: int) -> "PackedKVCache":
        """One row of the batch as a cache of its own."""
        row = self._with([plane.extract(index) for plane in self.planes])
        kept_tokens.take_rows(row, self, [index])
        return row

    def prepare(self, **kwargs: Any) -> None:
        """Prepare for a padded prompt, as mlx-lm's batch caches do."""
        if max(kwargs.get("right_padding") or [0]) > 0:
            kept_tokens.expect(self, kwargs["lengths"])
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
        kept_tokens.unite(merged, caches)
        return merged

    @property
    def rows(self) -> int:
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
        if self.last is not None and self.last.sides.arrays:
            states.append(self.last.sides.arrays)
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


def _plain(array: Packed | mx.array) -> mx.array:
    return array.plain() if isinstance(array, Packed) else array
