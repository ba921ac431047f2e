"""The rounding kernels, their own source run on the CPU, against the same steps in numpy."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from kernel_shim import kernel_factory

from mlx_optiq_ext.weights.precision import BITS, GROUP_SIZES
from mlx_optiq_ext.weights.rounding.device import Device
from mlx_optiq_ext.weights.rounding.grid import Format
from mlx_optiq_ext.weights.rounding.host import Host
from mlx_optiq_ext.weights.rounding.selection import HOST, agrees

pytestmark = pytest.mark.newest

DTYPES = {32: mx.bfloat16, 64: mx.float16, 128: mx.float32}


@pytest.fixture(scope="module", params=["cuda", "metal"])
def gpu(request, tmp_path_factory) -> Device:
    return Device(
        request.param, kernel_factory(request.param, tmp_path_factory.mktemp(request.param))
    )


def given(size: int, rows: int = 5) -> dict[str, np.ndarray]:
    """One group of two weights."""
    rng = np.random.default_rng(size)
    inputs = rng.normal(size=(2, 3 * size, size)) + 0.5
    moment = np.einsum("bni,bnj->bij", inputs, inputs) / size
    share = np.stack([np.diag(m) / np.diag(m).sum() for m in moment])
    arrays = {
        "weight": rng.normal(size=(2, rows, size)),
        "shift": 0.1 * rng.normal(size=(2, rows, size)),
        "share": share,
        "coupling": np.triu(0.2 * rng.normal(size=(2, size, size)) / size**0.5, 1),
        "moment": moment,
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_a_kernel_rounds_a_group_as_numpy_does(gpu, bits, size):
    arrays, form = given(size), Format(bits, size, DTYPES[size])
    ours: dict[str, Any] = {name: mx.array(array) for name, array in arrays.items()}
    first = ("weight", "shift", "share", "coupling")
    expected, left = HOST.feedback(*(arrays[name] for name in first), form)
    group, error = gpu.feedback(*(ours[name] for name in first), form)
    assert [a.dtype for a in group] == [mx.uint8, mx.float32, mx.float32]
    # Where a code lies half way between two, sums in another order may choose the other.
    assert (np.array(group.codes) == expected.codes).mean() > 0.99
    assert np.allclose(np.array(error), arrays["weight"] - restored(group), atol=1e-5)
    assert energy(np.array(error), arrays) == pytest.approx(energy(left, arrays), rel=1e-3)

    slope = left @ arrays["moment"]
    expected, change = HOST.sweep(slope, expected, arrays["moment"], form)
    group, changed = gpu.sweep(
        mx.array(slope), type(group)(*map(mx.array, HOST.feedback(
            *(arrays[name] for name in first), form)[0])), ours["moment"], form
    )  # fmt: skip
    after = energy(left + np.array(changed), arrays)
    assert after == pytest.approx(energy(left + change, arrays), rel=1e-3)
    assert after < energy(left, arrays)
    assert np.allclose(left + np.array(changed), arrays["weight"] - restored(group), atol=1e-5)


def restored(group) -> np.ndarray:
    codes, scales, biases = map(np.array, group)
    return codes.astype(np.float32) * scales + biases


def energy(error: np.ndarray, arrays: dict[str, np.ndarray]) -> float:
    return float(((error @ arrays["moment"]) * error).sum())


def test_products_keep_what_differences_of_large_numbers_need():
    device = Device("cuda", lambda **options: None)
    left, right = (np.random.default_rng(n).normal(size=(64, 64)) for n in (1, 2))
    found = device.product(device.array(left), device.factor(device.array(right)))
    assert np.abs(np.array(found) - left @ right).max() < 3e-4


def test_a_kernel_that_works_is_used_and_another_is_not(gpu):
    assert agrees(gpu)

    class Wrong(Host):
        def feedback(self, *args):
            group, error = super().feedback(*args)
            return group._replace(codes=group.codes ^ 1), error

    assert not agrees(Wrong())

    def fails(**options):
        raise RuntimeError("no such compiler")

    assert not agrees(Device("cuda", fails))
