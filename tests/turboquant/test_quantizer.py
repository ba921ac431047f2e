"""TurboQuant against its paper's table, and its packed form."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.turboquant import (
    Encoded,
    Quantizer,
    Rotation,
    bitstream,
    codebook,
    create_quantizer,
)

#: Squared error on unit vectors by bits (TurboQuant, table 1; its Gaussian limit to three digits).
PAPER = {1: 0.363, 2: 0.117, 3: 0.0345, 4: 0.0095}


def unit_vectors(count: int, dim: int, seed: int = 0) -> mx.array:
    found = mx.random.normal((count, dim), key=mx.random.key(seed))
    return found / mx.linalg.norm(found, axis=-1, keepdims=True)


@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_the_squared_error_is_that_of_the_paper(dim, bits):
    quantizer = create_quantizer(dim, bits, seed=3)
    vectors = unit_vectors(4096, dim, seed=bits)
    error = float(mx.square(quantizer.decode(quantizer.encode(vectors)) - vectors).sum(-1).mean())
    # At few dimensions the exact distribution has thinner tails than its limit: it costs less.
    assert 0.95 * PAPER[bits] < error < 1.03 * PAPER[bits]
    assert error < 2.72 * 4.0**-bits


@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("dim", [3, 64, 128, 4096])
def test_levels_are_the_means_of_what_they_stand_for(dim, bits):
    """Lloyd's two conditions, over samples of the distribution itself."""
    random = np.random.default_rng(dim)
    one, rest = random.standard_normal(400_000), random.chisquare(dim - 1, 400_000)
    sample = np.abs(one) / np.sqrt(one**2 + rest)
    levels = np.array(codebook.levels(dim, bits))
    nearest = np.digitize(sample, codebook.boundaries(dim, bits))
    for index, level in enumerate(levels):
        inside = sample[nearest == index]
        assert abs(inside.mean() - level) < 5 * inside.std() / math.sqrt(len(inside))


@given(
    bits=st.integers(1, 8), words=st.integers(1, 6), rows=st.integers(1, 4), seed=st.integers(0, 99)
)
def test_codes_are_packed_as_mlx_packs_them(bits, words, rows, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, 32 * words)).astype(np.uint32)
    packed = np.array(bitstream.pack(mx.array(codes), bits))
    assert packed.shape == (rows, words * bits)
    for row, expected in zip(packed, codes, strict=True):
        stream = int.from_bytes(row.astype("<u4").tobytes(), "little")
        assert [stream >> bits * i & 2**bits - 1 for i in range(codes.shape[1])] == list(expected)
    assert np.array_equal(np.array(bitstream.unpack(mx.array(packed), bits)), codes)


@pytest.mark.parametrize("dim", [32, 96, 128, 160, 352])
def test_rotations_are_orthogonal_and_follow_their_seed(dim):
    rotation = Rotation(dim, seed=4)
    matrix = rotation(mx.eye(dim))
    assert mx.allclose(matrix @ matrix.T, mx.eye(dim), atol=1e-5)
    array = mx.random.normal((5, dim), key=mx.random.key(1))
    assert mx.allclose(rotation.back(rotation(array)), array, atol=1e-4)
    assert mx.array_equal(Rotation(dim, seed=4)(array), rotation(array))
    assert not mx.allclose(Rotation(dim, seed=5)(array), rotation(array))


@pytest.mark.parametrize("bits", [2, 4])
def test_inner_products_are_unbiased(bits):
    one, other = unit_vectors(2, 128, seed=8)
    expected = float((one * other).sum())
    found = []
    for seed in range(400):
        quantizer = create_quantizer(128, bits, seed=seed, inner_product=True)
        found.append(float((quantizer.decode(quantizer.encode(one)) * other).sum()))
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found) - expected) < 3 * error


@pytest.mark.parametrize("inner_product", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_shapes_types_and_bytes(dtype, inner_product):
    quantizer = create_quantizer(96, 3, inner_product=inner_product)
    vectors = mx.random.normal((2, 5, 96)).astype(dtype)
    encoded = quantizer.encode(vectors)
    decoded = quantizer.decode(encoded)
    assert decoded.shape == vectors.shape
    assert decoded.dtype == dtype
    if dtype == mx.bfloat16:
        assert encoded.nbytes == vectors.size * quantizer.bits_per_element / 8
    # A zero has no direction and stays what it is.
    zero = quantizer.decode(quantizer.encode(mx.zeros((1, 96), dtype)))
    assert mx.array_equal(zero, mx.zeros((1, 96), dtype))


def test_another_seed_decodes_to_something_else():
    vectors = unit_vectors(16, 64)
    encoded = Quantizer(64, 4, seed=1).encode(vectors)
    assert isinstance(encoded, Encoded)
    wrong = Quantizer(64, 4, seed=2).decode(encoded)
    assert float(mx.square(wrong - vectors).sum(-1).mean()) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((128, 5), "no codebook of 5 bits: use one of 1, 2, 3, 4"),
        ((100, 4), "a multiple of 32 elements, not 100"),
    ],
)
def test_what_cannot_be_quantized_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        create_quantizer(*arguments)


def test_an_inner_product_quantizer_needs_a_bit_for_the_residual():
    with pytest.raises(InputError, match="no codebook of 1 bits: use one of 2, 3, 4"):
        create_quantizer(128, 1, inner_product=True)


def test_vectors_of_another_length_are_refused():
    with pytest.raises(InputError, match=r"\(2, 64\) do not end in the quantizer's 128"):
        create_quantizer(128, 4).encode(mx.zeros((2, 64)))
