"""Packs affine codes into words with the layout of ``mx.quantize``."""

import mlx.core as mx


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack codes into 32-bit words.

    MLX stores every width as one little-endian bit stream a row, so 32 codes of ``bits`` bits fill
    exactly ``bits`` words.

    Args:
        codes: (..., in), whole numbers from 0 to ``2**bits - 1``; ``in`` a multiple of 32.
        bits: 2, 3, 4, 5, 6 or 8.

    Returns:
        uint32 (..., in * bits / 32).

    Raises:
        ValueError: The last axis is not a multiple of 32.
    """
    if codes.shape[-1] % 32:
        raise ValueError(f"{codes.shape[-1]} codes a row do not fill whole words: give 32s")
    codes = mx.unflatten(codes.astype(mx.uint32), -1, (-1, 32))
    words = [mx.zeros(codes.shape[:-1], mx.uint32) for _ in range(bits)]
    for position in range(32):
        word, offset = divmod(position * bits, 32)
        code = codes[..., position]
        words[word] = words[word] | mx.left_shift(code, mx.array(offset, mx.uint32))
        if offset + bits > 32:
            spilled = mx.right_shift(code, mx.array(32 - offset, mx.uint32))
            words[word + 1] = words[word + 1] | spilled
    return mx.stack(words, axis=-1).flatten(-2, -1)


def unpack(packed: mx.array, bits: int) -> mx.array:
    """Inverse of `pack`: uint32 words (..., in * bits / 32) to uint32 codes (..., in)."""
    words = mx.unflatten(packed, -1, (-1, bits))
    mask = mx.array((1 << bits) - 1, mx.uint32)
    codes = []
    for position in range(32):
        word, offset = divmod(position * bits, 32)
        code = mx.right_shift(words[..., word], mx.array(offset, mx.uint32))
        if offset + bits > 32:
            spilled = mx.left_shift(words[..., word + 1], mx.array(32 - offset, mx.uint32))
            code = code | spilled
        codes.append(code & mask)
    return mx.stack(codes, axis=-1).flatten(-2, -1)
