"""The rounding kernels, their own source run on the CPU, against the same steps in numpy."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from kernel_shim import kernel_factory

from mlx_optiq_ext.weights import Precision
from mlx_optiq_ext.weights.precision import BITS, GROUP_SIZES
from mlx_optiq_ext.weights.rounding.device import Device
from mlx_optiq_ext.weights.rounding.grid import Format, Rounded
from mlx_optiq_ext.weights.rounding.host import Host
from mlx_optiq_ext.weights.rounding.inputs import Fed
from mlx_optiq_ext.weights.rounding.metric import Metric, Ordered
from mlx_optiq_ext.weights.rounding.refinement import restored
from mlx_optiq_ext.weights.rounding.selection import HOST, agrees
from mlx_optiq_ext.weights.rounding.stage import Rounding, Stage, Thoroughness, experts

pytestmark = pytest.mark.newest

DTYPES = {32: mx.bfloat16, 64: mx.float16, 128: mx.float32}


@pytest.fixture(scope="module", params=["cuda", "metal"])
def gpu(request, tmp_path_factory) -> Device:
    return Device(
        request.param, kernel_factory(request.param, tmp_path_factory.mktemp(request.param))
    )


def metric(columns: int, batch: int) -> Metric:
    rng = np.random.default_rng(columns)
    rows = rng.normal(size=(batch, 3 * columns, columns)) + 0.5
    return Metric(mx.array(np.einsum("bni,bnj->bij", rows, rows).astype(np.float32)))


@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_a_kernel_rounds_as_numpy_does(gpu, bits, size):
    form, inputs = Format(bits, size, DTYPES[size]), metric(2 * size, 2)
    # By one row a block, and by four of which the last block has fewer.
    gpu = replace(gpu, blocks=1 if bits % 2 else 100)
    target = mx.random.normal((2, 6, 2 * size), key=mx.random.key(bits))
    here, there = inputs.ordered(size, HOST), inputs.ordered(size, gpu)
    expected = HOST.feedback(np.array(target), here, form)
    found = gpu.feedback(target, there, form)
    assert [a.dtype for a in found] == [mx.uint8, *[mx.float32] * 3]
    check(found.error, expected.error, found, target, here)

    slope = HOST.product(expected.error, here.moment)
    after, _ = HOST.sweep(expected, slope, here, form)
    start = Rounded(*map(mx.array, expected))
    found, changed = gpu.sweep(start, mx.array(slope), there, form)
    check(found.error, after.error, found, target, here)
    assert np.allclose(np.array(changed), np.array(found.error) - expected.error, atol=1e-5)
    assert energy(found.error, here) < energy(expected.error, here)


def check(error, expected, found: Rounded, target: mx.array, inputs: Ordered) -> None:
    """As good as numpy's, and the error of what is stored."""
    assert energy(error, inputs) == pytest.approx(energy(expected, inputs), rel=1e-3)
    codes, scales, biases = (np.array(part) for part in found[:3])
    each = target.shape[-1] // scales.shape[-1]
    left = codes * np.repeat(scales, each, -1) + np.repeat(biases, each, -1)
    assert np.allclose(np.array(error), np.array(target) - left, atol=1e-5)


def energy(error, inputs: Ordered) -> float:
    error = np.array(error, np.float64)
    return float(((error @ inputs.moment) * error).sum())


def test_products_keep_what_differences_of_large_numbers_need():
    device = Device("cuda", lambda **options: None)
    left, right = (np.random.default_rng(n).normal(size=(64, 64)) for n in (1, 2))
    found = device.product(device.array(left), device.array(right))
    assert np.abs(np.array(found) - left @ right).max() < 3e-4
    left, right = device.array(left), device.array(right)
    assert mx.array_equal(replace(device, exact=False).product(left, right), left @ right)


def test_a_kernel_that_works_is_used_and_another_is_not(gpu):
    assert agrees(gpu)

    class Wrong(Host):
        def feedback(self, target, found, form):
            found = super().feedback(target, found, form)
            return found._replace(codes=found.codes ^ 1)

        def sweep(self, done, slope, found, form):
            return done, done.error

    assert not agrees(Wrong())

    def fails(**options):
        raise RuntimeError("no such compiler")

    assert not agrees(Device("cuda", fails))


def test_what_is_prepared_beside_the_device_is_rounded_as_numpy_rounds_it(gpu):
    plan, across = {"a": Precision(3, 32), "b": Precision(3, 64)}, metric(8, 1).moment[0]
    weights = {
        "a": mx.random.normal((8, 64), key=mx.random.key(1)).astype(DTYPES[32]),
        "b": mx.random.normal((4, 64), key=mx.random.key(2)).astype(DTYPES[64]),
    }
    stacks = {"a": mx.random.normal((2, 2, 64), key=mx.random.key(3)).astype(DTYPES[32])}
    rows = mx.random.normal((1, 36, 1, 1, 64), key=mx.random.key(4))
    feds = [Fed(rows, mx.array(np.arange(36)[None, :, None] % 2), (1, 36, 1, 1))]

    def lost(steps) -> list[float]:
        rounding = Rounding(plan, steps, Thoroughness(sweeps=1))
        stage = Stage(rounding, weights, {"a": across, "b": None})
        found = [
            *((weights[path], q, path) for path, q in stage.rounded(metric(64, 1)).items()),
            *((stacks[path], q, path) for path, q in experts(rounding, stacks, feds).items()),
        ]
        lefts = [weight - restored(q, plan[path], mx.float32) for weight, q, path in found]
        return [float(mx.square(left).sum()) for left in lefts]

    assert lost(gpu) == pytest.approx(lost(HOST), rel=0.02)
