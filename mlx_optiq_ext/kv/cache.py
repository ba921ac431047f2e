"""A per-layer cache that keeps keys and values packed.

mlx-lm's own caches know where each position goes: growth, sliding windows, batches with padding,
trimming, merging. They move whole rows and never look inside. So they hold a packed layer, and
everything about positions stays mlx-lm's: three of them, one each for codes, scales and biases, as
GPU kernels want them, or one of interleaved rows where each operation on an array costs more than
what it copies.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import mlx.core as mx

from ..turboquant.format import TurboFormat
from .attention.dispatch import backend
from .packed import AnyFormat, Format, Packed, joined, split
from .packing import parts_of

#: What models and mlx-lm read of a cache, answered by the first plane.
_READ = ("offset", "left_padding", "max_size", "keep", "chunk_size", "start_position", "_idx")


class PackedKVCache:
    """Packed keys and values of one layer, in the place of one of mlx-lm's caches.

    Attributes:
        planes: mlx-lm caches that share all positions. Plane ``i`` of three holds part ``i``
            (codes, scales, biases) of keys and values; a single one holds all, in 32-bit words.
        keys_format: Of the keys; None keeps them as they come.
        values_format: Of the values; None keeps them as they come.
        dense: Whether attention is handed plain arrays, for models with attention of their own.
        mergeable: Whether mlx-lm's batch engine may merge it with others.
    """

    def __init__(
        self,
        cache: Any,
        keys_format: AnyFormat | None,
        values_format: AnyFormat | None,
        *,
        dense: bool = False,
        mergeable: bool = True,
        interleaved: bool | None = None,
    ):
        """Take the place of an empty mlx-lm cache.

        ``interleaved`` keeps all of a position in one row, which TurboQuant's formats do not allow;
        None for what suits the default device.
        """
        from copy import deepcopy

        if interleaved is None:
            turbo = any(isinstance(f, TurboFormat) for f in (keys_format, values_format))
            interleaved = backend() == "cpu" and not turbo
        apart = 0 if interleaved else 2
        self.planes: list[Any] = [cache, *(deepcopy(cache) for _ in range(apart))]
        #: Name of the dtype of what was packed, once that is known.
        self.dtype: str | None = None
        self.keys_format = keys_format
        self.values_format = values_format
        self.dense = dense
        self.mergeable = mergeable

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Append keys and values (batch, heads, length, dim); returns all that attention may see.

        Raises:
            UnsupportedError: The head dimension does not fit the format.
        """
        if self.keys_format is not None:
            self.keys_format = self.keys_format.fitted(keys.shape[-1])
        if self.values_format is not None:
            self.values_format = self.values_format.fitted(values.shape[-1])
        self.dtype = str(keys.dtype).rpartition(".")[2]
        sides = parts_of(keys, values, self.keys_format, self.values_format)
        rows = [map(joined, sides)] if len(self.planes) == 1 else zip(*sides, strict=True)
        pairs = zip(self.planes, rows, strict=True)
        return self._views([plane.update_and_fetch(*pair) for plane, pair in pairs])

    def keys_and_values(self) -> tuple[Any, Any]:
        """All that attention may see."""
        return self._views([plane.keys_and_values() for plane in self.planes])

    def _views(self, fetched: list[tuple[mx.array, mx.array]]) -> tuple[Any, Any]:
        keys, values = zip(*fetched, strict=True)
        if len(self.planes) == 1:
            dtype = getattr(mx, self.dtype or "float32")
            keys = split(keys[0], self.keys_format, dtype)
            values = split(values[0], self.values_format, dtype)
        return (
            _view(keys, self.keys_format, self.dense),
            _view(values, self.values_format, self.dense),
        )

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        """As mlx-lm's cache makes it."""
        return self.planes[0].make_mask(*args, **kwargs)

    def maybe_trim_front(self) -> None:
        """Drop what lies before the current chunk, for chunked attention."""
        for plane in self.planes:
            plane.maybe_trim_front()

    def is_trimmable(self) -> bool:
        """Whether the last tokens can be taken back."""
        return self.planes[0].is_trimmable()

    def trim(self, n: int) -> int:
        """Take back the last ``n`` tokens; returns how many it took."""
        taken = [plane.trim(n) for plane in self.planes]
        return taken[0]

    def size(self) -> int:
        """Tokens held."""
        return self.planes[0].size()

    def empty(self) -> bool:
        """Whether it has held nothing yet."""
        return self.planes[0].keys is None

    @property
    def keys(self) -> mx.array | None:
        """Codes of the keys as stored; models set it only to tie the order of evaluation."""
        return self.planes[0].keys

    @keys.setter
    def keys(self, value: mx.array) -> None:
        self.planes[0].keys = value

    @property
    def values(self) -> mx.array | None:
        """Codes of the values as stored."""
        return self.planes[0].values

    @property
    def nbytes(self) -> int:
        """Stored bytes, room to grow included."""
        return sum(
            array.nbytes
            for plane in self.planes
            for array in (plane.keys, plane.values)
            if array is not None
        )

    def filter(self, batch_indices: Any) -> None:
        """Keep these rows of the batch."""
        for plane in self.planes:
            plane.filter(batch_indices)

    def extend(self, other: "PackedKVCache") -> None:
        """Append another batch's rows."""
        for plane, others in zip(self.planes, other.planes, strict=True):
            plane.extend(others)
        self.keys_format = _known(self.keys_format, other.keys_format)
        self.values_format = _known(self.values_format, other.values_format)
        self.dtype = self.dtype or other.dtype

    def extract(self, index: int) -> "PackedKVCache":
        """One row of the batch as a cache of its own."""
        return self._with([plane.extract(index) for plane in self.planes])

    def prepare(self, **kwargs: Any) -> None:
        """As mlx-lm's batch caches, before a padded prompt."""
        for plane in self.planes:
            plane.prepare(**kwargs)

    def finalize(self) -> None:
        """As mlx-lm's batch caches, after a padded prompt."""
        for plane in self.planes:
            plane.finalize()

    def _merge(self, caches: Sequence["PackedKVCache"]) -> "PackedKVCache":
        merged = self._with(
            [self.planes[i].merge([c.planes[i] for c in caches]) for i in range(len(self.planes))]
        )
        for cache in caches:
            merged.keys_format = _known(merged.keys_format, cache.keys_format)
            merged.values_format = _known(merged.values_format, cache.values_format)
            merged.dtype = merged.dtype or cache.dtype
        return merged

    def _with(self, planes: list[Any]) -> "PackedKVCache":
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, planes=planes)
        return other

    def __getattr__(self, name: str) -> Any:
        # mlx-lm asks with hasattr whether a cache can join a batch.
        planes = self.__dict__.get("planes")
        if planes and name == "merge" and self.mergeable and hasattr(planes[0], "merge"):
            return self._merge
        if planes and name in _READ:
            return getattr(planes[0], name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def state(self) -> Any:
        """What mlx-lm evaluates and saves."""
        from mlx_optiq_compat import symbols

        states = [_storable(plane.state) for plane in self.planes]
        if symbols.cache_has_meta_state(self.planes[0]):
            return states
        return [states, self._description()]

    @state.setter
    def state(self, value: Any) -> None:
        states, description = value
        self._restore(states, None, description)

    @property
    def meta_state(self) -> Any:
        """What mlx-lm before 0.32 saves beside the arrays."""
        return [self._description(), [plane.meta_state for plane in self.planes]]

    @classmethod
    def from_state(cls, state: Any, meta_state: Any = None) -> "PackedKVCache":
        """Build from what `state`, and before mlx-lm 0.32 `meta_state`, gave."""
        cache = object.__new__(cls)
        if meta_state is None:
            cache.state = state
        else:
            description, metas = meta_state
            cache._restore(state, metas, description)
        return cache

    def _description(self) -> str:
        return json.dumps(
            {
                "cache": type(self.planes[0]).__name__,
                "keys": self.keys_format and asdict(self.keys_format),
                "values": self.values_format and asdict(self.values_format),
                "dense": self.dense,
                "mergeable": self.mergeable,
                "dtype": self.dtype,
            }
        )

    def _restore(self, states: Any, metas: Any, description: str) -> None:
        from mlx_lm.models import cache as caches

        found = json.loads(description)
        kind = getattr(caches, found["cache"])
        self.keys_format = found["keys"] and _format(found["keys"])
        self.values_format = found["values"] and _format(found["values"])
        self.dense, self.mergeable = found["dense"], found["mergeable"]
        self.dtype = found.get("dtype")
        states = [_restored(state, states[0]) for state in states]
        if metas is None:
            self.planes = [kind.from_state(state) for state in states]
        else:
            self.planes = [kind.from_state(*pair) for pair in zip(states, metas, strict=True)]


def _storable(state: Any) -> Any:
    """A plane's state with a number in place of arrays of no width, which old MLX cannot save."""
    if not isinstance(state, list | tuple):
        return state
    return [mx.zeros((1,), a.dtype) if _is_rows(a) and a.shape[-1] == 0 else a for a in state]


def _restored(state: Any, first: Any) -> Any:
    """Undo `_storable`; the first plane, which has widths, tells the shapes."""
    if not isinstance(state, list | tuple):
        return state
    return [
        mx.zeros((*like.shape[:3], 0), a.dtype) if _is_rows(like) and a.ndim == 1 else a
        for a, like in zip(state, first, strict=True)
    ]


def _is_rows(array: Any) -> bool:
    return isinstance(array, mx.array) and array.ndim == 4


def _view(parts: tuple[mx.array, ...], format: AnyFormat | None, dense: bool) -> Any:
    if format is None:
        return parts[0].view(parts[1].dtype)
    packed = Packed(parts, format)
    return packed.plain() if dense else packed


def _format(found: dict[str, Any]) -> AnyFormat:
    return TurboFormat(**found) if "seed" in found else Format(**found)


def _known(one: AnyFormat | None, other: AnyFormat | None) -> AnyFormat | None:
    """Of two equal formats the one whose group size was fitted."""
    return other if one is not None and one.group_size is None else one
