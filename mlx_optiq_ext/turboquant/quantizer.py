"""Vectors as packed codebook indices and one norm each."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import InputError
from . import bitstream, codebook
from .rotation import Rotation


@dataclass(frozen=True)
class Encoded:
    """Encoded vectors.

    Attributes:
        codes: uint32 (..., dim * bits / 32). A code's top bit is the sign, the rest the number of
            its magnitude.
        norms: (..., 1) in the vectors' type.
        signs: Signs of the residual's projections, uint32 (..., dim / 32); `ProductQuantizer` only.
        residuals: Norms of the residuals, (..., 1); `ProductQuantizer` only.
    """

    codes: mx.array
    norms: mx.array
    signs: mx.array | None = None
    residuals: mx.array | None = None

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        parts = (self.codes, self.norms, self.signs, self.residuals)
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True)
class Quantizer:
    """TurboQuant for the least squared error (Zandieh et al., arXiv 2504.19874, algorithm 1).

    A random rotation gives every coordinate of a unit vector one known distribution; each is
    rounded to the codebook that is optimal for it. Nothing is calibrated. On unit vectors the
    squared error is at most ``2.72 * 4 ** -bits`` in expectation.

    Attributes:
        dim: Dimension of a vector, a multiple of 32.
        bits: Bits of a coordinate, 1 to 4.
        seed: Seed of the rotation.
    """

    dim: int
    bits: int
    seed: int = 0

    @property
    def rotation(self) -> Rotation:
        """The rotation before rounding."""
        return Rotation(self.dim, self.seed)

    @property
    def bits_per_element(self) -> float:
        """Stored bits of an element, with its share of a 16-bit norm."""
        return self.bits + 16 / self.dim

    def encode(self, vectors: mx.array) -> Encoded:
        """Encode (..., dim) floating-point vectors.

        Raises:
            InputError: The last axis is not ``dim``.
        """
        _check(vectors, self.dim)
        norms, unit = _polar(vectors)
        rotated = self.rotation(unit)
        return Encoded(self._codes(rotated), norms.astype(vectors.dtype))

    def decode(self, encoded: Encoded, dtype: mx.Dtype | None = None) -> mx.array:
        """Vectors (..., dim), up to rounding, in ``dtype`` or the norms' type."""
        dtype = dtype or encoded.norms.dtype
        return self.rotation.back(self.rotated(encoded, mx.float32)).astype(dtype)

    def rotated(self, encoded: Encoded, dtype: mx.Dtype | None = None) -> mx.array:
        """Like `decode`, but in the rotated basis, where attention can stay."""
        dtype = dtype or encoded.norms.dtype
        table = mx.array(self._table(), dtype=dtype)
        return table[bitstream.unpack(encoded.codes, self.bits)] * encoded.norms.astype(dtype)

    def _codes(self, rotated: mx.array) -> mx.array:
        magnitude = mx.abs(rotated)
        found = (rotated < 0).astype(mx.uint32) << (self.bits - 1)
        for boundary in codebook.boundaries(self.dim, self.bits):
            found = found + (magnitude > boundary)
        return bitstream.pack(found, self.bits)

    def _table(self) -> list[float]:
        """The value of each code."""
        positive = codebook.levels(self.dim, self.bits)
        return [*positive, *(-level for level in positive)]


@dataclass(frozen=True)
class ProductQuantizer:
    """TurboQuant for unbiased inner products (the paper's algorithm 2); for research.

    One bit less goes to a `Quantizer`; one is the sign of the residual's projection on a Gaussian
    vector, which makes the estimate of every inner product unbiased over the draw of the seed.

    Attributes:
        dim: Dimension of a vector, a multiple of 32.
        bits: Bits of a coordinate, 2 to 4, including the residual's.
        seed: Seed of the rotation and the projections.
    """

    dim: int
    bits: int
    seed: int = 0

    @property
    def bits_per_element(self) -> float:
        """Stored bits of an element, with its share of two 16-bit norms."""
        return self.bits + 32 / self.dim

    @property
    def _inner(self) -> Quantizer:
        return Quantizer(self.dim, self.bits - 1, self.seed)

    def encode(self, vectors: mx.array) -> Encoded:
        """Encode (..., dim) floating-point vectors.

        Raises:
            InputError: The last axis is not ``dim``.
        """
        coarse = self._inner.encode(vectors)
        left = vectors.astype(mx.float32) - self._inner.decode(coarse, mx.float32)
        norms, _ = _polar(left)
        signs = bitstream.pack((left @ self._projection().T) < 0, 1)
        return Encoded(coarse.codes, coarse.norms, signs, norms.astype(vectors.dtype))

    def decode(self, encoded: Encoded, dtype: mx.Dtype | None = None) -> mx.array:
        """Vectors (..., dim) whose inner products with any other are unbiased."""
        assert encoded.signs is not None
        assert encoded.residuals is not None
        signs = 1 - 2 * bitstream.unpack(encoded.signs, 1).astype(mx.float32)
        scale = (np.pi / 2) ** 0.5 / self.dim * encoded.residuals.astype(mx.float32)
        found = self._inner.decode(encoded, mx.float32) + scale * (signs @ self._projection())
        return found.astype(dtype or encoded.norms.dtype)

    def _projection(self) -> mx.array:
        # A separate random stream, so that projections and rotation are independent.
        drawn = np.random.default_rng((self.seed, 1)).standard_normal((self.dim, self.dim))
        return mx.array(drawn.astype(np.float32))


def create_quantizer(
    dim: int, bits: int, *, seed: int = 0, inner_product: bool = False
) -> Quantizer | ProductQuantizer:
    """A quantizer of vectors.

    Args:
        dim: Dimension of a vector, a multiple of 32.
        bits: Bits of a coordinate: 1 to 4, or 2 to 4 for inner products.
        seed: Seed of the random rotation; decoding needs the same one.
        inner_product: Whether inner products shall be unbiased rather than the error least.

    Raises:
        InputError: The dimension or the bits are none of these.
    """
    allowed = codebook.BITS[inner_product:]
    if bits not in allowed:
        names = ", ".join(map(str, allowed))
        raise InputError(f"TurboQuant has no codebook of {bits!r} bits: use one of {names}")
    if dim < 32 or dim % 32:
        raise InputError(f"TurboQuant packs vectors of a multiple of 32 elements, not {dim}")
    return (ProductQuantizer if inner_product else Quantizer)(dim, bits, seed)


def _check(vectors: mx.array, dim: int) -> None:
    if vectors.ndim == 0 or vectors.shape[-1] != dim:
        raise InputError(f"vectors of shape {vectors.shape} do not end in the quantizer's {dim}")


def _polar(vectors: mx.array) -> tuple[mx.array, mx.array]:
    """Norms (..., 1) and unit vectors in float32; a zero stays zero."""
    vectors = vectors.astype(mx.float32)
    norms = mx.linalg.norm(vectors, axis=-1, keepdims=True)
    return norms, vectors / mx.maximum(norms, 1e-30)
