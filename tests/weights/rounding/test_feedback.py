import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_optiq_ext.weights.precision import BITS, GROUP_SIZES, Precision, dequantized, quantize
from mlx_optiq_ext.weights.rounding import feedback as rounding
from mlx_optiq_ext.weights.rounding.codes import pack, unpack
from mlx_optiq_ext.weights.rounding.feedback import column_order, round_weight
from mlx_optiq_ext.weights.rounding.grid import Format, fit
from mlx_optiq_ext.weights.rounding.refinement import compensated, restored


def correlated(size: int, seed: int) -> mx.array:
    """A second moment as neighbouring inputs of a trained model have it."""
    mix = mx.random.normal((size, size), key=mx.random.key(seed)) / size**0.5
    rows = mx.random.normal((4 * size, size), key=mx.random.key(seed + 1)) @ (mix + mx.eye(size))
    return rows.T @ rows / (4 * size)


def loss(weight, left, moment) -> float:
    difference = weight - left
    return float(((difference @ moment) * difference).sum())


@given(st.sampled_from(BITS), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_codes_are_packed_as_mlx_packs_them(bits, rows, words, seed):
    codes = mx.random.randint(0, 2**bits, (rows, 32 * words), key=mx.random.key(seed))
    packed = pack(codes, bits)
    assert mx.array_equal(unpack(packed, bits), codes)
    scales, biases = mx.ones((rows, words)), mx.zeros((rows, words))
    read = mx.dequantize(packed, scales, biases, group_size=32, bits=bits)
    assert mx.array_equal(read, codes.astype(mx.float32))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_unpacked_codes_of_mlx_are_its_codes(bits, group_size):
    weight = mx.random.normal((4, 256), key=mx.random.key(bits))
    packed, scales, biases = mx.quantize(weight, group_size=group_size, bits=bits)
    codes = unpack(packed, bits).astype(mx.float32).reshape(4, -1, group_size)
    expected = mx.dequantize(packed, scales, biases, group_size=group_size, bits=bits)
    found = (codes * scales[..., None] + biases[..., None]).reshape(4, -1)
    assert mx.allclose(found, expected, atol=1e-6)


def test_codes_that_fill_no_word_are_refused():
    with pytest.raises(ValueError, match="33 codes"):
        pack(mx.zeros((1, 33)), 4)


@pytest.mark.parametrize(
    "precision", [Precision(2, 32), Precision(3, 64), Precision(4, 128), Precision(8, 64)]
)
def test_feedback_loses_less_than_plain_rounding(precision):
    weight = mx.random.normal((24, 128), key=mx.random.key(3))
    moment = correlated(128, 5)
    packed = round_weight(weight, moment, precision, mx.float32)
    reference = quantize(weight, precision)
    assert [a.shape for a in packed] == [a.shape for a in reference]
    assert [a.dtype for a in packed] == [a.dtype for a in reference]
    ours = loss(weight, restored(packed, precision, mx.float32), moment)
    plain = loss(weight, dequantized(weight, precision, mx.float32), moment)
    assert ours < 0.75 * plain


def test_sweeps_never_make_it_worse():
    weight = mx.random.normal((16, 128), key=mx.random.key(7))
    moment, precision = correlated(128, 9), Precision(3, 64)
    damped = moment / mx.mean(mx.diag(moment)) + 0.02 * mx.eye(128)
    losses = [
        loss(
            weight,
            restored(
                round_weight(weight, moment, precision, mx.float32, sweeps=n), precision, mx.float32
            ),
            damped,
        )
        for n in range(4)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_scales_are_searched_as_they_are_stored(dtype):
    weight = mx.random.normal((8, 64), key=mx.random.key(11))
    form = Format(3, 64, dtype)
    scales, biases = (mx.array(a) for a in fit(np.array(weight), np.ones(64), form))
    assert mx.array_equal(scales, scales.astype(dtype).astype(mx.float32))
    assert mx.array_equal(biases, biases.astype(dtype).astype(mx.float32))
    codes = mx.clip(mx.round((weight - biases) / scales), 0, 7)
    ours = float(mx.square(codes * scales + biases - weight).sum())
    plain = dequantized(weight.astype(dtype), Precision(3, 64), mx.float32)
    assert ours < float(mx.square(plain - weight).sum())


@given(st.floats(-1e4, 1e4, width=32))
@settings(max_examples=200, deadline=None)
def test_storage_is_rounded_as_mlx_rounds(value):
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        stored = Format(4, 64, dtype).stored(np.array([value], np.float32))
        assert stored[0] == float(mx.array(value, mx.float32).astype(dtype).astype(mx.float32))


def test_knowing_the_outputs_side_loses_less_there():
    weight = mx.random.normal((96, 128), key=mx.random.key(21))
    moment, outputs, precision = correlated(128, 23), correlated(96, 25), Precision(2, 64)

    def both(packed) -> float:
        left = weight - restored(packed, precision, mx.float32)
        return float(((outputs @ left @ moment) * left).sum())

    one = both(round_weight(weight, moment, precision, mx.float32))
    two = both(round_weight(weight, moment, precision, mx.float32, outputs=outputs))
    assert two < 0.95 * one


@given(st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_the_order_of_rounding_keeps_groups_together(count, seed):
    moment = np.array(correlated(32 * count, seed))
    columns, groups = column_order(moment, 32)
    assert sorted(columns.tolist()) == list(range(32 * count))
    assert (columns.reshape(-1, 32) // 32 == groups[:, None]).all()


def test_the_order_of_rounding_ends_with_the_smallest_variance():
    variances = np.arange(1.0, 65.0, dtype=np.float32)
    columns, groups = column_order(np.diag(variances), 32)
    assert columns.tolist() == list(range(63, -1, -1))
    assert groups.tolist() == [1, 0]


def test_the_order_of_rounding_loses_less_than_the_order_stored(monkeypatch):
    variances = mx.exp(1.5 * mx.random.normal((128,), key=mx.random.key(1)))
    moment = correlated(128, 5) * mx.sqrt(variances * variances[:, None])
    weight, precision = mx.random.normal((64, 128), key=mx.random.key(3)), Precision(4, 32)

    def left() -> float:
        return loss(weight, dequantized_from(weight, moment, precision), moment)

    ordered = left()
    stored = np.arange(128), np.arange(4)
    monkeypatch.setattr(rounding, "column_order", lambda moment, size: stored)
    assert ordered < 0.97 * left()


def dequantized_from(weight, moment, precision) -> mx.array:
    packed = round_weight(weight, moment, precision, mx.float32)
    return restored(packed, precision, mx.float32)


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_constant_weight_is_kept(value):
    weight = mx.full((4, 64), value)
    packed = round_weight(weight, mx.eye(64), Precision(3, 64), mx.float32)
    left = restored(packed, Precision(3, 64), mx.float32)
    assert float(mx.abs(left - weight).max()) < 1e-4


def test_inputs_that_are_never_used_do_no_harm():
    weight = mx.random.normal((8, 64), key=mx.random.key(13))
    packed = round_weight(weight, mx.zeros((64, 64)), Precision(4, 64), mx.float32)
    assert np.isfinite(np.array(restored(packed, Precision(4, 64), mx.float32))).all()


def test_a_compensated_target_maps_shifted_inputs_back():
    weight = mx.random.normal((6, 32), key=mx.random.key(17))
    plain = mx.random.normal((400, 32), key=mx.random.key(18))
    shifted = plain * 1.2
    target = compensated(weight, shifted.T @ shifted, plain.T @ shifted)
    expected = plain @ weight.T
    before = float(mx.square(shifted @ weight.T - expected).sum())
    after = float(mx.square(shifted @ target.T - expected).sum())
    assert after < 0.5 * before
    unchanged = compensated(weight, plain.T @ plain, plain.T @ plain)
    assert mx.allclose(unchanged, weight, atol=1e-5)
