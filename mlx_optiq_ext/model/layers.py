"""Finds a model's decoder layers and linear layers, and replaces their calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers in order, or an empty list if the model does not name them."""
    layers = getattr(model, "layers", None)
    if not isinstance(layers, list | tuple):
        return []
    return [layer for layer in layers if isinstance(layer, nn.Module)]


def layer_index(model: nn.Module) -> dict[str, int]:
    """Maps the path of every module inside a decoder layer to that layer's index."""
    position = {id(layer): index for index, layer in enumerate(decoder_layers(model))}
    prefixes = {path: position[id(m)] for path, m in model.named_modules() if id(m) in position}
    return {
        path: prefixes[prefix]
        for path, _ in model.named_modules()
        for prefix in _parents(path)
        if prefix in prefixes
    }


def _parents(path: str) -> Iterator[str]:
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        yield ".".join(parts[:end])


@contextmanager
def calls_replaced(layers: list[nn.Module], call: Any) -> Iterator[None]:
    """Replace each layer's ``__call__`` by ``call(index, original, args, kwargs)``.

    ``original`` is the layer's own call, bound to it.

    The class is swapped for a subclass, since Python looks ``__call__`` up on the type.
    """
    classes, calls = [type(layer) for layer in layers], [call]
    try:
        replace_calls(layers, lambda *given: calls[0](*given))
        yield
    finally:
        calls.clear()  # classes are collected late, so this one must not keep the call's data alive
        for layer, cls in zip(layers, classes, strict=True):
            layer.__class__ = cls


def replace_calls(layers: list[nn.Module], call: Any) -> None:
    """Like `calls_replaced`, but permanently."""
    for index, layer in enumerate(layers):
        cls = type(layer)

        def replaced(self, *args, _index=index, _cls=cls, **kwargs):
            return call(_index, partial(_cls.__call__, self), args, kwargs)

        layer.__class__ = type(cls.__name__, (cls,), {"__call__": replaced})


def plain(value: Any) -> bool:
    """Whether a value is plain data, not an object that layers could write to."""
    if isinstance(value, tuple):
        return all(plain(part) for part in value)
    return value is None or isinstance(value, mx.array | nn.Module | str | int | float)


def copied(value: Any) -> Any:
    """A copy with new array objects, which item assignment elsewhere does not change."""
    return tree_map(
        lambda leaf: copy(leaf) if isinstance(leaf, mx.array) else leaf,
        value,
        is_leaf=nn.Module.is_module,
    )


def arrays(value: Any) -> list[mx.array]:
    """The floating-point arrays in a layer's arguments or result, in order."""
    leaves = tree_flatten([value], is_leaf=nn.Module.is_module)
    return [leaf for _, leaf in leaves if isinstance(leaf, mx.array) and _floating(leaf)]


def with_arrays(value: Any, given: list[mx.array]) -> Any:
    """A copy with other arrays in place of its floating-point `arrays`."""
    others = iter(given)
    return tree_map(
        lambda leaf: next(others) if _floating(leaf) else leaf,
        value,
        is_leaf=nn.Module.is_module,
    )


def _floating(leaf: Any) -> bool:
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


def quantizable(model: nn.Module) -> list[tuple[str, Any]]:
    """``(path, module)`` of every module that ``nn.quantize`` passes to its predicate."""
    return [(path, module) for path, module in leaves(model) if hasattr(module, "to_quantized")]


def leaves(model: nn.Module) -> list[tuple[str, Any]]:
    """``(path, module)`` of every module without modules inside."""
    found = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    assert isinstance(found, list)
    return found
