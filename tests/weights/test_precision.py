import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.utils import compute_bits_per_weight

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.weights.candidates import Size, tensors
from mlx_optiq_ext.weights.precision import (
    AFFINE,
    BITS,
    GROUP_SIZES,
    MODES,
    Precision,
    dequantized,
    quantize,
)

PRECISIONS = st.builds(Precision, st.sampled_from(BITS), st.sampled_from(GROUP_SIZES))
OTHERS = [
    Precision(bits, group_size, mode)
    for mode, each in MODES.items()
    for bits in each.bits
    for group_size in each.group_sizes
    if mode != AFFINE
]
DTYPES = st.sampled_from([mx.float32, mx.bfloat16, mx.float16])


@given(
    PRECISIONS | st.sampled_from(OTHERS),
    DTYPES,
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 2**31),
)
@settings(max_examples=120, deadline=None)
def test_stored_bits_are_the_bytes_that_mlx_stores(precision, dtype, rows, groups, seed):
    shape = (rows, groups * max(32, precision.group_size))
    assert precision.fits(shape)
    weight = mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)
    stored = sum(array.nbytes * 8 for array in quantize(weight, precision))
    assert precision.stored_bits(shape, weight.dtype.size * 8) == stored


@given(PRECISIONS, st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))
@settings(max_examples=120, deadline=None)
def test_what_a_packing_leaves_is_within_half_a_step(precision, rows, groups, seed):
    shape = (rows, groups * precision.group_size)
    weight = mx.random.normal(shape, key=mx.random.key(seed))
    grouped = np.array(weight).reshape(rows, groups, precision.group_size)
    step = (grouped.max(-1) - grouped.min(-1)) / (2**precision.bits - 1)
    left = np.array(dequantized(weight, precision, mx.float32)).reshape(grouped.shape)
    # MLX shifts the grid so that the largest value is hit exactly, which costs up to a step.
    assert (np.abs(left - grouped) <= 1.01 * step[..., None] + 1e-6).all()


@given(PRECISIONS, st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_every_value_lies_on_its_groups_grid(precision, seed):
    weight = mx.random.normal((3, 2 * precision.group_size), key=mx.random.key(seed))
    _, scales, biases = (np.array(a) for a in quantize(weight, precision))
    left = np.array(dequantized(weight, precision, mx.float32)).reshape(3, 2, -1)
    codes = (left - biases[..., None]) / scales[..., None]
    assert np.abs(codes - codes.round()).max() < 1e-2
    assert codes.round().min() >= 0
    assert codes.round().max() <= 2**precision.bits - 1


@pytest.mark.parametrize("precision", OTHERS, ids=str)
def test_a_mode_without_biases_is_rounded_as_mlx_rounds_it(precision):
    weight = mx.random.normal((4, 128), key=mx.random.key(1)).astype(mx.bfloat16)
    layer = nn.Linear(128, 4, bias=False)
    layer.weight = weight
    stored = layer.to_quantized(**precision.settings)
    x = mx.eye(128, dtype=mx.bfloat16)
    left = dequantized(weight, precision, mx.float32)
    assert mx.array_equal(stored(x).T.astype(mx.float32), left)
    assert mx.abs(left - weight).mean() < 0.15


@pytest.mark.parametrize("precision", [Precision(3, 64), *OTHERS], ids=str)
def test_a_precision_is_read_back_from_what_mlx_lm_is_told(precision):
    assert Precision.of(precision.settings) == precision
    assert ("mode" in precision.settings) == (precision.mode != AFFINE)
    assert precision.exists


def test_settings_are_completed_by_the_defaults_of_mlx():
    assert Precision.of({}) == Precision(4, 64)
    assert Precision.of({"mode": "nvfp4"}) == Precision(4, 16, "nvfp4")


def test_an_unknown_mode_is_refused():
    with pytest.raises(InputError, match="'int4' is not a quantization mode of MLX: give affine"):
        Precision(4, 64, "int4")


def test_an_unquantized_weight_costs_its_dtype():
    assert Precision(16, 0).stored_bits((4, 8), 16) == 4 * 8 * 16
    assert str(Precision(16, 0)) == "16-bit"
    assert str(Precision(3, 64)) == "3-bit g64"


class Model(nn.Module):
    def __init__(self, predicate=None):
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.wide = nn.Linear(128, 64, bias=True)
        self.odd = nn.Linear(40, 8)
        self.norm = nn.RMSNorm(64)
        if predicate:
            self._predicate = predicate

    @property
    def quant_predicate(self):
        return self._predicate


def test_candidates_are_what_mlx_can_pack():
    found = {t.path: t for t in tensors(Model(lambda path, module: True))}
    assert set(found) == {"embed", "wide"}
    assert {p.group_size for p in found["embed"].precisions} == {32, 64}
    assert {p.group_size for p in found["wide"].precisions} == {32, 64, 128}
    assert {p.bits for p in found["wide"].precisions} == set(BITS)


def test_candidates_rise_in_stored_bits():
    for tensor in tensors(Model(lambda path, module: True), allow_unquantized=True):
        sizes = [tensor.stored_bits(p) for p in tensor.precisions]
        assert sizes == sorted(sizes)
        assert tensor.precisions[-1] == tensor.unquantized


def test_the_models_own_predicate_is_a_floor():
    own = {"embed": False, "wide": {"bits": 8, "group_size": 64}}
    (tensor,) = tensors(Model(lambda path, module: own.get(path, True)))
    assert tensor.path == "wide"
    assert set(tensor.precisions) == {Precision(8, 64), Precision(8, 32)}


def test_a_floor_above_the_wanted_bits_stays_the_only_candidate():
    own = {"embed": False, "wide": {"bits": 8, "group_size": 64}}
    (tensor,) = tensors(Model(lambda path, module: own.get(path, True)), bits=(2, 3))
    assert tensor.precisions == (Precision(8, 64),)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("precision", [Precision(3, 32), Precision(4, 64), Precision(8, 64)])
def test_bits_per_weight_are_those_mlx_lm_prints(precision, dtype):
    model = Model(lambda path, module: True)
    model.set_dtype(dtype)
    found = tensors(model)
    size = Size.of(model, found)
    stored = sum(t.stored_bits(precision) for t in found)
    nn.quantize(
        model,
        precision.group_size,
        precision.bits,
        class_predicate=lambda path, module: path in {t.path for t in found},
    )
    assert size.bits_per_weight(stored) == pytest.approx(compute_bits_per_weight(model))
    assert size.room(size.bits_per_weight(stored)) == pytest.approx(stored, abs=1)
