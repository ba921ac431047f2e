"""Scales and biases of affine groups with less error than MLX's, by clipping and least squares.

MLX's affine quantization spans each group from its smallest to its largest element. At few bits,
finer steps for most elements outweigh the error of clipping the largest. The scale that is stored
keeps the product of a group with itself, which least squares would shrink. The functions are
compiled, so that a group is read a few times and not once for each operation.
"""

import math
from collections.abc import Callable
from functools import cache

import mlx.core as mx

from .compilation import compiled

#: Bits -> best share of a group's range to cover, at a group size of 64; above 1 covers all.
COVERED = {2: 0.65, 3: 0.85, 4: 0.95, 5: 1.05}
#: Offsets around that share to start from, and least-squares fits from each start.
AROUND, FITS = (-0.1, 0.0, 0.1), 2
TINY = 1e-9

Parts = tuple[mx.array, mx.array, mx.array]


def pack(array: mx.array, bits: int, group_size: int) -> Parts:
    """Pack the last axis as ``mx.quantize`` lays it out, with less error.

    Args:
        array: (..., length, dim). A position is packed the same whatever stands beside it, so that
            a prompt may be computed in any parts.
        bits: Width of a code.
        group_size: Divides ``dim``.

    Returns:
        Codes, scales and biases, each (..., length, its own width).
    """
    share = share_of(bits, group_size)
    if share is None or not array.size:
        return _plain(array, bits, group_size)
    groups = mx.unflatten(array, -1, (-1, group_size))
    codes, scale, bias = _search(share, bits, group_size)(groups)
    return _words(codes, bits), scale[..., 0], bias[..., 0]


def share_of(bits: int, group_size: int) -> float | None:
    """Best share of a group's range to cover, above 1 all of it; None if it was not fitted."""
    if bits not in COVERED:
        return None
    # Extremes of a longer group lie further out.
    return COVERED[bits] - 0.05 * math.log2(group_size / 64)


def _plain(array: mx.array, bits: int, group_size: int) -> Parts:
    codes, scales, biases = mx.quantize(array, group_size=group_size, bits=bits)
    return codes, scales, biases


@cache
def _unbiased(group_size: int) -> Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]:
    """Scale and bias for groups and their codes, both (..., elements).

    Least squares would shrink a group towards its mean, and with it the score of the very query
    that looks for its key. This scale keeps the product of a group with itself, and the bias its
    mean.
    """

    def unbiased(array: mx.array, codes: mx.array) -> tuple[mx.array, mx.array]:
        groups, codes = array.astype(mx.float32), codes.astype(mx.float32)
        mean, middle = groups.mean(axis=-1, keepdims=True), codes.mean(axis=-1, keepdims=True)
        off = groups - mean
        square = mx.square(off).sum(axis=-1, keepdims=True)
        product = (off * codes).sum(axis=-1, keepdims=True)
        some = mx.abs(product) > TINY  # MLX's codes may fall where elements rise
        scale = mx.where(some, square / mx.where(some, product, 1.0), 0.0)
        scale = scale.astype(array.dtype)
        return scale, (mean - scale.astype(mx.float32) * middle).astype(array.dtype)

    return compiled(unbiased)


@cache
def _search(share: float, bits: int, group_size: int) -> Callable[[mx.array], Parts]:
    """Codes of groups (..., elements), with the best scale and bias found from a few starts."""
    top = float(2**bits - 1)
    starts = sorted({min(share + step, 1.0) for step in AROUND})

    def search(array: mx.array) -> Parts:
        groups = array.astype(mx.float32)
        low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
        mean, span = groups.mean(axis=-1, keepdims=True), high - low
        shares = mx.array(starts)
        # (..., groups, starts), and elements last.
        scale, bias = mx.maximum(span * (shares / top), TINY), low + span * ((1 - shares) / 2)
        each, centred = groups[..., None, :], (groups - mean)[..., None, :]
        explained = scale
        for _ in range(FITS):
            codes = mx.clip(mx.round((each - bias[..., None]) / scale[..., None]), 0, top)
            middle = codes.mean(axis=-1)
            # Elements are centred, so codes do not have to be.
            product = (codes * centred).sum(axis=-1)
            square = mx.square(codes).sum(axis=-1) - group_size * mx.square(middle)
            square = mx.maximum(square, TINY)
            scale, explained = mx.maximum(product / square, TINY), mx.square(product) / square
            bias = mean - scale * middle
        # MLX before 0.31 confuses shapes when it selects from an axis of size one.
        if len(starts) > 1:
            best = mx.argmax(explained, axis=-1, keepdims=True)
            scale, bias = (mx.take_along_axis(found, best, axis=-1) for found in (scale, bias))
        codes = mx.clip(mx.round((groups - bias) / mx.maximum(scale, TINY)), 0, top)
        return codes.astype(mx.uint32), *_unbiased(group_size)(array, codes)

    return compiled(search)


def _words(codes: mx.array, bits: int) -> mx.array:
    """Codes (..., groups, elements) as one little-endian bit stream per row, in uint32 words."""
    # Whole codes at once where they fill words, else bit by bit.
    step = 1 if 32 % bits else bits
    if step == 1:
        codes = mx.right_shift(codes[..., None], mx.arange(bits, dtype=mx.uint32)) & 1
        codes = codes.flatten(-2)
    stream = codes.reshape(*codes.shape[:-2], -1, 32 // step)
    places = step * mx.arange(32 // step, dtype=mx.uint32)
    return mx.left_shift(stream, places).sum(axis=-1).astype(mx.uint32)
