"""Seeded random rotations of the last axis."""

from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np

from .hadamard import rotatable, rotate, rotate_back


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix drawn from a seed.

    A Hadamard matrix times random signs where MLX has one of this size, else the Q of a Gaussian
    matrix's QR decomposition.

    Attributes:
        dim: Size of the axis.
        seed: The same seed gives the same matrix on every machine.
    """

    dim: int
    seed: int = 0

    def __call__(self, array: mx.array) -> mx.array:
        """Rotate (..., dim)."""
        if rotatable(self.dim):
            return rotate(array * _signs(self.dim, self.seed).astype(array.dtype))
        return array @ _orthogonal(self.dim, self.seed).astype(array.dtype)

    def back(self, array: mx.array) -> mx.array:
        """Undo the rotation of (..., dim)."""
        if rotatable(self.dim):
            return rotate_back(array) * _signs(self.dim, self.seed).astype(array.dtype)
        return array @ _orthogonal(self.dim, self.seed).T.astype(array.dtype)


@cache
def _signs(dim: int, seed: int) -> mx.array:
    drawn = np.random.default_rng(seed).integers(0, 2, dim) * 2 - 1
    return _made(drawn.astype(np.float32))


@cache
def _orthogonal(dim: int, seed: int) -> mx.array:
    gaussian = np.random.default_rng(seed).standard_normal((dim, dim))
    q, r = np.linalg.qr(gaussian)
    return _made((q * np.sign(np.diag(r))).astype(np.float32))


def _made(values: np.ndarray) -> mx.array:
    array = mx.array(values)
    mx.eval(array)  # evaluated, so that the cached array does not belong to one thread
    return array
