"""Moments of a model's keys and queries, and the transforms of keys that follow from them.

Keys turn with their position (RoPE), so that what is known of the first thousand positions says
little of others. Sequences are therefore run at positions spread over the model's context: scores
depend on differences of positions, and what attention does stays the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import distributed
from ..errors import InputError
from ..model.vocabulary import embedding_rows
from .cache import PackedKVCache
from .formats import Affine, Format, KeyTransform
from .formats.key_transform import fitted
from .layout import Mounted, Slot, packed_caches, stock_caches
from .plan import LayerFormat

#: First tokens of a sequence, whose keys are like no others (attention sinks).
FIRST = 4
#: Tokens and sequences of random text, where no text is at hand.
LENGTH, COUNT = 512, 4
#: Longest context to spread positions over, and where they begin, as shares of it.
CONTEXT, STARTS = 32_768, (0.0, 1 / 16, 1 / 4, 1.0)
#: Names of the longest context in models' arguments.
LIMITS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")


class Moments:
    """Sums over keys and queries of one cache, in float32 about the first keys' mean."""

    def __init__(self) -> None:
        """Nothing is counted yet."""
        self.origin: mx.array | None = None
        self.keys: list[tuple[int, mx.array, mx.array]] = []
        self.queries: list[tuple[int, mx.array]] = []
        self.heads, self.itemsize, self.sinks = 1, 4, False

    def add_keys(self, keys: mx.array) -> None:
        """Count keys (1, heads, length, dim), except for the first positions."""
        self.heads, self.itemsize = keys.shape[1], keys.dtype.size
        found = keys[0, :, FIRST:].astype(mx.float32)
        if self.origin is None:
            self.origin = found.mean(axis=1, keepdims=True)
        off = found - self.origin
        self.keys.append((off.shape[1], off.sum(axis=1), off.swapaxes(1, 2) @ off))

    def add_queries(self, queries: mx.array) -> None:
        """Count queries (1, query heads, length, dim); those of a group together."""
        found = mx.unflatten(queries[0, :, FIRST:].astype(mx.float32), 0, (self.heads, -1))
        found = found.flatten(1, 2)
        self.queries.append((found.shape[1], found.swapaxes(1, 2) @ found))

    def evaluate(self) -> None:
        """Compute what was counted, so that no activation is held."""
        mx.eval(self.keys, self.queries)

    def transform(self) -> KeyTransform:
        """The transform that follows.

        Raises:
            InputError: The model's keys are not finite.
        """
        assert self.origin is not None, "no keys were counted"
        count = sum(n for n, _, _ in self.keys)
        mean = np.sum([_float64(total) for _, total, _ in self.keys], axis=0) / count
        about = np.sum([_float64(square) for _, _, square in self.keys], axis=0) / count
        origin = _float64(self.origin)[:, 0]
        cross = origin[:, :, None] * mean[:, None]
        moment = about + cross + cross.swapaxes(1, 2) + origin[:, :, None] * origin[:, None]
        asked = None
        if self.queries:
            asked = np.sum([_float64(square) for _, square in self.queries], axis=0)
            asked /= sum(n for n, _ in self.queries)
        return KeyTransform(*fitted(origin + mean, moment, asked, centred=not self.sinks))


@dataclass(frozen=True, eq=False)
class Observed(Format):
    """Keys as they are, whose moments are counted, and those of the queries that meet them.

    Attributes:
        moments: Where they are counted.
    """

    name: ClassVar[str] = "observed"
    parts: ClassVar[tuple[str, ...]] = ("elements", "type")

    bits: int = 16
    moments: Any = None

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], where: str) -> "Observed":
        """It is in no plan."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """It is in no plan."""
        raise NotImplementedError

    def fitted(self, dim: int) -> "Observed":
        """The same: any dimension will do."""
        return self

    @property
    def bits_per_element(self) -> float:
        """Those of the elements."""
        return 8 * self.moments.itemsize

    def pack(self, array: mx.array) -> tuple[mx.array, mx.array]:
        """The bits of an array, and its dtype in an array of no width."""
        self.moments.add_keys(array)
        return array.view(mx.uint32), array[..., :0]

    def unpack(self, parts: Sequence[mx.array], dtype: mx.Dtype) -> mx.array:
        """Undo `pack`."""
        return parts[0].view(parts[1].dtype).astype(dtype)

    def head_dim(self, words: int) -> int:
        """As many elements as the words hold."""
        return words * 4 // self.moments.itemsize

    def turn_queries(self, array: mx.array) -> mx.array:
        """Count the queries."""
        self.moments.add_queries(array)
        return array

    def turn_sinks(self, sinks: mx.array) -> mx.array:
        """Note that the model has sinks."""
        self.moments.sinks = True
        return sinks


class _Shifted(PackedKVCache):
    """A cache whose positions begin behind zero."""

    shift = 0

    @property
    def offset(self) -> Any:
        return self.planes[0].offset + self.shift


def transforms(
    model: nn.Module,
    mounted: Mounted,
    sequences: np.ndarray | None = None,
) -> dict[Slot, KeyTransform]:
    """The transform of each cache whose keys a plan transforms without saying how.

    A cache that no layer writes to gets none.

    Args:
        model: An mlx-lm model.
        mounted: The plan's formats.
        sequences: int32 (n, length) to run, each at other positions. None takes random tokens: the
            moments of keys hardly depend on the text.

    Raises:
        InputError: The model's keys are not finite.
    """
    slots = unfitted(mounted)
    # Caches of one layer share its transform.
    moments = {mounted.owners[slot]: Moments() for slot in slots}
    formats = {s: LayerFormat(Observed(moments=moments[mounted.owners[s]]), None) for s in slots}
    observing = replace(mounted, formats=formats, mergeable=False)
    reach = context(model)
    sequences = _random(model) if sequences is None else sequences
    sequences = sequences[:, :reach]
    for number, tokens in enumerate(sequences):
        shift = _shift(reach, number, len(sequences), len(tokens))
        caches = packed_caches(stock_caches(model), observing, _Shifted)
        for cache in _shifted(caches):
            cache.shift = shift
        logits = model(mx.array(tokens)[None], cache=caches)
        if distributed.size() > 1:  # each waits for what the others compute
            mx.eval(logits)
        for found in moments.values():
            found.evaluate()
    known = {}
    for layer, found in moments.items():
        try:
            known |= {layer: found.transform()} if found.keys else {}
        except InputError as error:
            raise InputError(f"layer {layer}: {error}") from error
    return {slot: known[mounted.owners[slot]] for slot in slots if mounted.owners[slot] in known}


def pieces(sequences: np.ndarray) -> np.ndarray:
    """Sequences (n, length) cut into pieces that `transforms` runs at different positions."""
    length = min(LENGTH, sequences.shape[1])
    whole = sequences[:, : sequences.shape[1] // length * length]
    return whole.reshape(-1, length)


def unfitted(mounted: Mounted) -> list[Slot]:
    """Caches whose keys are to be transformed and whose transform is not known."""
    keys = {slot: formats.keys for slot, formats in mounted.formats.items()}
    return [
        s for s, f in keys.items() if isinstance(f, Affine) and f.transformed and not f.transform
    ]


def with_transforms(mounted: Mounted, found: Mapping[Slot, KeyTransform]) -> Mounted:
    """Formats that know their transforms."""
    known = {slot: mounted.formats[slot].with_transform(each) for slot, each in found.items()}
    return replace(mounted, formats={**mounted.formats, **known})


def _shifted(caches: Sequence[Any]) -> list[_Shifted]:
    members = (getattr(cache, "caches", None) or [cache] for cache in caches)
    return [cache for row in members for cache in row if isinstance(cache, _Shifted)]


def context(model: nn.Module) -> int | None:
    """Positions that a model reaches, at most `CONTEXT`; None for one that does not say."""
    given = _fields(getattr(model, "args", None))
    inner = _fields(given.get("text_config"))
    given |= {name: inner[name] for name in LIMITS if name in inner}
    known = [given[name] for name in LIMITS if isinstance(given.get(name), int)]
    return min([CONTEXT, *known]) if known else None


def _fields(args: Any) -> dict[str, Any]:
    """Arguments of a model, which come as a table or as an object."""
    return dict(args if isinstance(args, Mapping) else getattr(args, "__dict__", {}))


def _shift(reach: int | None, number: int, count: int, length: int) -> int:
    """Position at which a sequence begins; zero for models that do not say how far they reach."""
    place = number * (len(STARTS) - 1) // max(count - 1, 1)
    return 0 if reach is None else int(STARTS[place] * (reach - length))


def _random(model: nn.Module) -> np.ndarray:
    rows = embedding_rows(model) or 256
    return np.random.default_rng(0).integers(0, rows, (COUNT, LENGTH), dtype=np.int32)


def _float64(array: mx.array) -> np.ndarray:
    return np.array(array).astype(np.float64)
