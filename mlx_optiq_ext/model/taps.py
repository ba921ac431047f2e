"""Observes the inputs and outputs of a model's quantizable layers while it runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class Use:
    """One use of a quantizable layer.

    Attributes:
        path: Its layer path.
        inputs: (..., in), or token ids (...) where an embedding is looked up.
        indices: Expert of each output row (...), for stacked experts; else None.
        outputs: (..., out).
    """

    path: str
    inputs: mx.array
    indices: mx.array | None
    outputs: mx.array

    @property
    def lookup(self) -> bool:
        """Whether the use is an embedding's look-up, not a product."""
        return mx.issubdtype(self.inputs.dtype, mx.integer)


#: Takes a use, and returns the layer's replaced output.
Tap = Callable[[Use], mx.array]


@contextmanager
def tapped(modules: Mapping[str, nn.Module], tap: Tap) -> Iterator[None]:
    """Call ``tap`` with every use of these layers.

    A tied embedding is two layers in one: its look-up calls it, the head calls ``as_linear``.

    Args:
        modules: Layer path -> module. The class of each is swapped for a subclass while inside.
        tap: Called with each use, in the order they happen.
    """
    classes = {path: type(module) for path, module in modules.items()}
    taps = [tap]

    def subclass(path: str, cls: type) -> type:
        def call(self, x, *args, **kwargs):
            indices = args[0] if args and isinstance(args[0], mx.array) else kwargs.get("indices")
            output = cls.__call__(self, x, *args, **kwargs)
            if isinstance(output, mx.array):
                return taps[0](Use(path, x, indices, output))
            # A fused projection returns its parts.
            whole = taps[0](Use(path, x, indices, mx.concatenate(output, axis=-1)))
            *ends, _ = accumulate(part.shape[-1] for part in output)
            return mx.split(whole, ends, axis=-1)

        def as_linear(self, x):
            return taps[0](Use(path, x, None, cls.as_linear(self, x)))  # pyright: ignore

        body: dict[str, Any] = {"__call__": call}
        if hasattr(cls, "as_linear"):
            body["as_linear"] = as_linear
        return type(cls.__name__, (cls,), body)

    try:
        for path, module in modules.items():
            module.__class__ = subclass(path, classes[path])
        yield
    finally:
        taps.clear()  # classes are collected late, so this one must not keep the tap's data alive
        for path, module in modules.items():
            module.__class__ = classes[path]
