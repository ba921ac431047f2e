"""A linear map of a layer's keys before they are packed, which attention does not see.

Scores are products of queries and keys: what a matrix does to keys, its inverse undoes on queries.
A vector that is taken off every key moves all scores of a query alike, which softmax ignores. The
map that leaves the least error of scores at a given step decorrelates keys in the metric of the
queries, gives keys and queries the same moments, and spreads them evenly over each group. The
direction that matters most in a group becomes its mean, which the group's bias keeps exactly.
Source: the transform of least quantization error of a product, from the moments of both factors;
rotations that spread a vector evenly are those of QuaRot (Ashkboos et al., arXiv 2404.00456).
"""

import hashlib
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import InputError

#: Smallest variance of keys in a direction, and smallest product with that of queries, as shares of
#: the largest: a few thousand tokens tell no more.
KEYS, PRODUCTS = 1e-5, 1e-8


@dataclass(frozen=True, eq=False)
class KeyTransform:
    """What is done to the keys of a layer; transforms with the same numbers are equal.

    Attributes:
        centre: Taken off each key, float32 (heads, 1, dim).
        basis: Maps what is left to uncorrelated coordinates, the most important first, float32
            (heads, dim, dim); coordinates are ``basis @ key``.
        group_size: Elements that share a scale and a bias; each group is spread evenly.
    """

    centre: np.ndarray
    basis: np.ndarray
    group_size: int = field(default=64)

    @cached_property
    def digest(self) -> str:
        """Digest of the numbers."""
        parts = (self.centre.tobytes(), self.basis.tobytes(), str(self.group_size).encode())
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyTransform) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        # Arrays of MLX, which are kept beside the numbers, cannot be sent to other processes.
        return KeyTransform, (self.centre, self.basis, self.group_size)

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeyTransform":
        return self  # copies of caches share it

    def __repr__(self) -> str:
        return f"KeyTransform({self.digest})"

    @cached_property
    def centred(self) -> bool:
        """Whether anything is taken off keys."""
        return bool(self.centre.any())

    def of_heads(self, start: int, end: int) -> "KeyTransform":
        """The transform of some of the heads."""
        return KeyTransform(self.centre[start:end], self.basis[start:end], self.group_size)

    @property
    def dim(self) -> int:
        """Head dimension."""
        return self.basis.shape[-1]

    @cached_property
    def matrices(self) -> tuple[mx.array, mx.array, mx.array]:
        """The centre; the map for rows of keys; its inverse, for rows of queries: float32."""
        spread = _spread(self.dim, self.group_size)
        full = spread @ self.basis.astype(np.float64)
        inverse = np.linalg.inv(self.basis.astype(np.float64)) @ spread.T
        keys = np.ascontiguousarray(full.swapaxes(1, 2), np.float32)
        return mx.array(self.centre), mx.array(keys), mx.array(inverse.astype(np.float32))

    def apply(self, keys: mx.array) -> mx.array:
        """Keys (batch, heads, length, dim) as they are packed, in their dtype."""
        centre, matrix, _ = self.matrices
        return ((keys.astype(mx.float32) - centre) @ matrix).astype(keys.dtype)

    def undo(self, keys: mx.array) -> mx.array:
        """Keys as the model made them, up to rounding."""
        centre, _, inverse = self.matrices
        found = keys.astype(mx.float32) @ inverse.swapaxes(1, 2) + centre
        return found.astype(keys.dtype)

    def queries(self, queries: mx.array) -> mx.array:
        """Queries (batch, query heads, length, dim) for keys that were transformed."""
        inverse = self.matrices[2]
        heads = inverse.shape[0]
        grouped = mx.unflatten(queries.astype(mx.float32), 1, (heads, -1))
        return (grouped @ inverse[:, None]).flatten(1, 2).astype(queries.dtype)


def fitted(
    mean: np.ndarray, keys: np.ndarray, queries: np.ndarray | None, *, centred: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Centre and basis of a `KeyTransform`, from moments in float64.

    A head whose keys are all equal, or whose queries are all zero (pruned heads), says nothing of
    directions: all count alike.

    Args:
        mean: Of keys, (heads, dim).
        keys: Second moment of keys, (heads, dim, dim), about zero.
        queries: Second moment of each head's queries about zero, likewise; None if queries are not
            known, which counts all directions alike.
        centred: Whether to take the mean off keys. It must not be where a model gives softmax a
            logit of its own (attention sinks), which then would not move along.

    Raises:
        InputError: The moments are not finite.
    """
    alike = np.eye(mean.shape[-1])
    queries = np.broadcast_to(alike, keys.shape) if queries is None else queries
    if not (np.isfinite(mean).all() and np.isfinite(keys).all() and np.isfinite(queries).all()):
        raise InputError("keys or queries are not finite: are the model's weights damaged?")
    centre = mean if centred else np.zeros_like(mean)
    # About another point c, from that about zero: E[kk'] - mc' - cm' + cc'.
    cross = mean[:, :, None] * centre[:, None]
    about = keys - cross - cross.swapaxes(1, 2) + centre[:, :, None] * centre[:, None]
    # What differs by rounding alone counts as equal.
    varying = _sizes(about) > 1e-12 * _sizes(keys)
    about = np.where(varying, about, alike)
    queries = np.where(_sizes(queries) > 0, queries, alike)
    values, vectors = np.linalg.eigh(about)
    largest = values.max(axis=-1, keepdims=True)
    values = np.maximum(values, KEYS * largest)
    root = np.einsum("hij,hj,hkj->hik", vectors, np.sqrt(values), vectors)
    inverse = np.einsum("hij,hj,hkj->hik", vectors, 1 / np.sqrt(values), vectors)
    products, turned = np.linalg.eigh(root @ queries @ root)
    products, turned = products[:, ::-1], turned[:, :, ::-1]  # the most important first
    products = np.maximum(products, PRODUCTS * np.maximum(products[:, :1], np.finfo(float).tiny))
    basis = np.einsum("hj,hij,hik->hjk", products**0.25, turned, inverse)
    return centre[:, None].astype(np.float32), basis.astype(np.float32)


def _sizes(moments: np.ndarray) -> np.ndarray:
    """Sum of the moments in all directions, from (heads, dim, dim) to (heads, 1, 1)."""
    return np.trace(moments, axis1=1, axis2=2)[:, None, None]


@cache
def _spread(dim: int, group_size: int) -> np.ndarray:
    """Coordinates dealt out to groups in turn, each group spread by a Hadamard matrix.

    The matrix's first row is constant, so the first coordinate of a group becomes its mean.
    """
    count = dim // group_size
    hadamard = np.ones((1, 1))
    while len(hadamard) < group_size:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    result = np.zeros((dim, dim))
    for group in range(count):
        rows = slice(group * group_size, (group + 1) * group_size)
        result[rows, group::count] = hadamard / np.sqrt(group_size)
    return result
