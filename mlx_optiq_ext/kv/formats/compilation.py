"""Compiled functions, where compiling them is safe."""

from collections.abc import Callable
from typing import TypeVar

import mlx.core as mx

from ... import distributed

T = TypeVar("T")


def compiled(function: Callable[..., T]) -> Callable[..., T]:
    """Compile a function of arrays of any shape, unless several processes compute on a CPU.

    For a CPU, MLX builds a library for each function in a folder that all processes share. Those
    that start together would load what another has written half.
    """
    if distributed.group().size() > 1 and mx.default_device() == mx.Device(mx.cpu):
        return function
    return mx.compile(function, shapeless=True)
