"""Hadamard rotations of the last axis."""

import mlx.core as mx


def rotatable(dim: int) -> bool:
    """Whether MLX has a Hadamard transform of this size."""
    odd = dim // (dim & -dim)
    return odd == 1 or (odd in (3, 5, 7) and dim % 4 == 0)


def rotate(array: mx.array) -> mx.array:
    """Rotate the last axis by the normalised Hadamard matrix."""
    return mx.hadamard_transform(array, scale=array.shape[-1] ** -0.5)


def rotate_back(array: mx.array) -> mx.array:
    """Undo `rotate`.

    The matrices of 2^k are symmetric and undo themselves; the others are not, so they are
    multiplied with their transpose.
    """
    dim = array.shape[-1]
    if dim & (dim - 1) == 0:
        return rotate(array)
    matrix = rotate(mx.eye(dim, dtype=array.dtype))
    return array @ matrix.T
