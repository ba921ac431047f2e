"""Codes of any width, packed without gaps into 32-bit words, least significant bits first.

It is the order of ``mx.quantize``, so that one kernel reads both.
"""

import mlx.core as mx
import numpy as np


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack (..., n) codes below ``2 ** bits`` into uint32 (..., n * bits / 32).

    ``n * bits`` must be a multiple of 32.
    """
    codes = codes.astype(mx.uint32)
    if 32 % bits:
        # Bit by bit: a code may lie across two words.
        codes = (codes[..., None] >> mx.arange(bits, dtype=mx.uint32)) & 1
        codes, bits = codes.flatten(-2), 1
    per_word = 32 // bits
    shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
    return (codes.reshape(*codes.shape[:-1], -1, per_word) << shifts).sum(axis=-1)


def unpack(words: mx.array, bits: int) -> mx.array:
    """Undo `pack`: uint32 (..., m) to uint32 codes (..., 32 * m / bits)."""
    mask = (1 << bits) - 1
    if 32 % bits == 0:
        shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
        return ((words[..., None] >> shifts) & mask).flatten(-2)
    first = np.arange(0, words.shape[-1] * 32, bits)
    word, shift = first // 32, (first % 32).astype(np.uint32)
    following = np.minimum(word + 1, words.shape[-1] - 1)
    low = words[..., mx.array(word)] >> mx.array(shift)
    # Shifting by 32 is undefined, and then there is nothing to take from the next word.
    across = mx.array(np.where(shift > 32 - bits, 32 - shift, 0).astype(np.uint32))
    high = mx.where(across > 0, words[..., mx.array(following)] << across, 0)
    return (low | high) & mask
