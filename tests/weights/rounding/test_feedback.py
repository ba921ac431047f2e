import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_optiq_ext.weights.precision import BITS, GROUP_SIZES, Precision, dequantized, quantize
from mlx_optiq_ext.weights.rounding.codes import pack, unpack
from mlx_optiq_ext.weights.rounding.feedback import OutputSide, round_weight
from mlx_optiq_ext.weights.rounding.grid import Format
from mlx_optiq_ext.weights.rounding.host import fit
from mlx_optiq_ext.weights.rounding.metric import Metric
from mlx_optiq_ext.weights.rounding.refinement import restored
from mlx_optiq_ext.weights.rounding.selection import HOST


def correlated(size: int, seed: int) -> mx.array:
    """A second moment as neighbouring inputs of a trained model have it."""
    mix = mx.random.normal((size, size), key=mx.random.key(seed)) / size**0.5
    rows = mx.random.normal((4 * size, size), key=mx.random.key(seed + 1)) @ (mix + mx.eye(size))
    return rows.T @ rows / (4 * size)


def rounded(weight, moment, precision, **options):
    """A weight rounded in numpy, with scales and biases in float32."""
    return round_weight(weight, Metric(moment), precision, mx.float32, steps=HOST, **options)


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
    packed = rounded(weight, moment, precision)
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
            restored(rounded(weight, moment, precision, sweeps=n), precision, mx.float32),
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
    scales, biases = (
        mx.array(a) for a in fit(np.array(weight), np.full(64, 1 / 64, np.float32), form)
    )
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

    one = both(rounded(weight, moment, precision))
    two = both(rounded(weight, moment, precision, outputs=OutputSide.of(np.array(outputs))))
    assert two < 0.95 * one


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_constant_weight_is_kept(value):
    weight = mx.full((4, 64), value)
    packed = rounded(weight, mx.eye(64), Precision(3, 64))
    left = restored(packed, Precision(3, 64), mx.float32)
    assert float(mx.abs(left - weight).max()) < 1e-4


def test_inputs_that_are_never_used_do_no_harm():
    weight = mx.random.normal((8, 64), key=mx.random.key(13))
    packed = rounded(weight, mx.zeros((64, 64)), Precision(4, 64))
    assert np.isfinite(np.array(restored(packed, Precision(4, 64), mx.float32))).all()


def test_a_target_maps_shifted_inputs_back():
    weight = mx.random.normal((6, 64), key=mx.random.key(17))
    plain = mx.random.normal((400, 64), key=mx.random.key(18))
    shifted = plain * 1.2
    metric = Metric(shifted.T @ shifted, plain.T @ shifted)
    expected = plain @ weight.T

    def left(share: float) -> float:
        packed = round_weight(weight, metric, Precision(8, 64), mx.float32, share=share, steps=HOST)
        found = shifted @ restored(packed, Precision(8, 64), mx.float32).T
        return float(mx.square(found - expected).sum())

    assert left(0.5) < 0.5 * left(0.0)
    assert left(1.0) < 0.1 * left(0.0)


def test_what_moves_a_target_solves_the_least_squares_problem():
    weight, damping = mx.random.normal((6, 96), key=mx.random.key(27)), 0.02
    own, cross = correlated(96, 29), correlated(96, 31)
    metric = Metric(own, cross)
    found = metric.ordered(32, HOST)
    moved = metric.made_up(HOST.array(weight[None]), found, HOST)[0]
    ridge = (damping + 1e-9) * np.diag(np.array(own)).mean() * np.eye(96)
    inverse = np.linalg.inv(np.array(own, np.float64) + ridge)
    expected = np.array(weight) @ (np.array(cross) - np.array(own)) @ inverse
    assert np.allclose(moved, expected[:, found.columns[0]], atol=1e-3 * np.abs(expected).max())


def test_experts_of_a_stack_are_rounded_as_each_alone():
    weights = mx.random.normal((3, 16, 64), key=mx.random.key(33))
    moments = mx.stack([correlated(64, seed) for seed in (35, 37, 39)])
    together = rounded(weights, moments, Precision(3, 32))
    for number in range(3):
        alone = rounded(weights[number], moments[number], Precision(3, 32))
        for one, part in zip(alone, together, strict=True):
            assert mx.array_equal(one, part[number])
