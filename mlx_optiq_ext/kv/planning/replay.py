"""Runs one sequence through a model repeatedly, with one cache changed each time."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ...model.layers import calls_replaced, decoder_layers
from ...planning.divergence import Reference
from ..layout import Mounted, Slot, owners, packed_caches, stock_caches
from ..plan import LayerFormat


@dataclass
class _Call:
    """The arguments and the result of a decoder layer's call; ``slots`` are its caches."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    index: int
    caches: dict[int, int]  # id of a cache -> its number in the model's list


class Replay:
    """A model's run over one sequence of tokens.

    Attributes:
        owners: Slot -> decoder layer that writes to it.
        reference: Its output distribution at every position.
        dense: Whether the model's attention gets plain arrays.
        shapes: Slot -> shapes (1, heads, positions, dim) of its keys and of its values.
    """

    def __init__(self, model: nn.Module, tokens: mx.array, found: Mapping[Slot, int] | None = None):
        """Run ``tokens`` (1, length) and record each decoder layer's arguments and result."""
        self.model, self.tokens, self.dense = model, tokens, True
        self.owners = dict(owners(model) if found is None else found)
        self._calls: list[_Call] = []
        caches = self._caches({})
        numbers = {id(cache): number for number, cache in enumerate(caches)}

        def call(index: int, original: Any, args: tuple, kwargs: dict) -> Any:
            output = original(*args, **kwargs)
            handed = {id(v): numbers[id(v)] for v in (*args, *kwargs.values()) if id(v) in numbers}
            self._calls.append(_Call(args, dict(kwargs), output, index, handed))
            return output

        with calls_replaced(decoder_layers(model), call):
            logits = model(tokens, cache=caches)
        mx.eval(logits, [leaf for _, leaf in _arrays([c.output for c in self._calls])])
        self.reference = Reference.of(logits)
        self.shapes = {slot: _shapes(caches, slot) for slot in self.owners}

    def reading(self, *, dense: bool) -> "Replay":
        """The same run, of a model whose attention reads plain arrays or packed ones.

        Only where it reads packed ones the last tokens are seen as they were computed.
        """
        other = copy(self)
        other.dense = dense
        return other

    def _caches(self, formats: Mapping[Slot, LayerFormat]) -> list[Any]:
        mounted = Mounted(formats, self.owners, self.dense, mergeable=False)
        return packed_caches(stock_caches(self.model), mounted)

    @cached_property
    def _readers(self) -> bool:
        """Whether a layer reads a cache that another layer writes to."""
        written = {slot[0]: layer for slot, layer in self.owners.items()}
        return any(
            written.get(number, call.index) != call.index
            for call in self._calls
            for number in call.caches.values()
        )

    def divergence(self, formats: Mapping[Slot, LayerFormat]) -> float:
        """Mean KL(reference || model) in nats over all positions, these caches packed.

        Layers before the first packed one are not computed again.
        """
        first = min((self.owners[slot] for slot in formats), default=0)
        number = 0

        def call(index: int, original: Any, args: tuple, kwargs: dict) -> Any:
            nonlocal number
            known = self._calls[number]
            number += 1
            return known.output if index < first else original(*args, **kwargs)

        caches = self._caches(formats)
        if self._readers or not self._calls:
            logits = self.model(self.tokens, cache=caches)
        else:
            with calls_replaced(decoder_layers(self.model), call):
                logits = self.model(self.tokens, cache=caches)
        return float(self.reference.divergence(logits).mean())

    def error(self, formats: Mapping[Slot, LayerFormat]) -> float:
        """Summed squared change of the output of the layers that own these caches.

        0 if the model does not hand its caches to its layers.
        """
        caches, total = self._caches(formats), 0.0
        numbers = {slot[0] for slot in formats}
        layers = {self.owners[slot] for slot in formats}
        for call in self._calls:
            if call.index not in layers or numbers.isdisjoint(call.caches.values()):
                continue
            args, kwargs = self._swapped(call, caches)
            output = decoder_layers(self.model)[call.index](*args, **kwargs)
            # The hidden state comes first; shared values after it are not an output.
            one, other = _arrays(output)[0][1], _arrays(call.output)[0][1]
            total += float(mx.square(one.astype(mx.float32) - other.astype(mx.float32)).sum())
        return total

    def _swapped(self, call: _Call, caches: list[Any]) -> tuple[tuple, dict]:
        def swap(value: Any) -> Any:
            return caches[call.caches[id(value)]] if id(value) in call.caches else value

        return tuple(map(swap, call.args)), {k: swap(v) for k, v in call.kwargs.items()}


def _arrays(value: Any) -> list[tuple[str, mx.array]]:
    flat = tree_flatten([value], is_leaf=lambda v: isinstance(v, mx.array))
    return [(name, leaf) for name, leaf in flat if isinstance(leaf, mx.array)]


def _shapes(caches: list[Any], slot: Slot) -> tuple[tuple[int, ...], tuple[int, ...]]:
    index, member = slot
    cache = caches[index] if member is None else caches[index].caches[member]
    positions = min(cache.offset, cache.keys.shape[2])
    keys, values = cache.keys.shape, cache.values.shape
    return (1, keys[1], positions, keys[3]), (1, values[1], positions, values[3])
