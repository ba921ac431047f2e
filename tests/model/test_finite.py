"""Numbers that a model cannot compute with are refused, and the tensor is named."""

import mlx.core as mx
import pytest

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.model.finite import LARGEST, check_arrays

DTYPES = (mx.float16, mx.bfloat16, mx.float32)
BAD = {"nan": "nan", "inf": "inf", "-inf": "inf", "2e19": r"2(\.\d+)?e\+19|inf"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", BAD)
def test_one_bad_element_among_many_is_found(value, dtype):
    array = mx.concatenate([mx.ones(4096), mx.array([float(value)]), mx.ones(77)]).astype(dtype)
    with pytest.raises(InputError, match=rf"^layer.weight holds ({BAD[value]}): "):
        check_arrays([("fine", mx.ones(3)), ("layer.weight", array)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_other_arrays_pass(dtype):
    largest = min(LARGEST, mx.finfo(dtype).max)
    arrays = [mx.array([0.0, -largest, largest]), mx.zeros((0, 4)), mx.array(1.0)]
    check_arrays([("a", array.astype(dtype)) for array in arrays])
    check_arrays([("codes", mx.array([2**32 - 1], dtype=mx.uint32))])
