"""Measures this machine with small kernels of decoding: what they read, compute and cost."""

import time
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from .chips import Chip
from .roofline import MATMUL

#: Bytes of the weights that the bandwidth is measured over: more than any cache holds.
READ_BYTES = 1 << 30
#: Kernels in the chain that the launch cost is measured over.
CHAIN = 300
#: Rows of the square product that the arithmetic is measured with.
SIDE = 4096
REPEATS = 5


def calibrate(
    *,
    read_bytes: int = READ_BYTES,
    chain: int = CHAIN,
    side: int = SIDE,
    clock: Callable[[], float] = time.perf_counter,
) -> Chip:
    """Measure bandwidth, launch cost and arithmetic of MLX's default device.

    Args:
        read_bytes: Bytes of packed weights to read.
        chain: Kernels in the dependent chain.
        side: Rows and columns of the product.
        clock: Seconds.

    Returns:
        A chip whose ``launch_us`` is set: its numbers are taken as they are, without a family's
        efficiency. The best of a few runs counts.
    """
    family = "nvidia" if _cuda() else "apple"
    launch = _launch_seconds(chain, clock)
    rate = _bytes_per_second(read_bytes, launch, clock)
    flops = _flops(side, clock)
    return Chip(
        id="this-machine",
        name=_device_name(),
        family=family,
        bandwidth_gbs=round(rate / 1e9, 3),
        # The roofline takes a family's share of the peak for a prompt's products.
        tflops=round(flops / MATMUL[family] / 1e12, 4),
        launch_us=round(launch * 1e6, 3),
        source="measured by --optiq-calibrate-chip",
    )


def summary(chip: Chip) -> str:
    """What was measured, on one line."""
    assert chip.launch_us is not None
    return (
        f"[optiq] {chip.name}: {chip.bandwidth_gbs:.1f} GB/s, {chip.launch_us:.2f} us a kernel, "
        f"{chip.tflops * MATMUL[chip.family]:.2f} TFLOP/s in a prompt's products"
    )


def _cuda() -> bool:
    return not mx.metal.is_available() and mx.default_device() != mx.Device(mx.cpu)


def _device_name() -> str:
    info = getattr(mx, "device_info", None) or mx.metal.device_info
    if mx.default_device() == mx.Device(mx.cpu):
        return "MLX on a CPU"
    try:
        return str(info().get("device_name", "this machine"))
    except (RuntimeError, TypeError):
        return "this machine"


def _dtype() -> mx.Dtype:
    return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16


def _best(run: Callable[[], None], clock: Callable[[], float]) -> float:
    run()  # compiles its kernels
    times = []
    for _ in range(REPEATS):
        start = clock()
        run()
        times.append(clock() - start)
    return max(min(times), 1e-9)


def _bytes_per_second(read_bytes: int, launch: float, clock: Callable[[], float]) -> float:
    """Over one-row products with many weights, as decoding reads them."""
    rows, columns = 4096, 4096
    dtype = _dtype()
    packed = dtype != mx.float32  # a CPU reads plain weights
    size = rows * columns * (4.5 / 8 if packed else 4)
    weights = []
    for _ in range(max(1, round(read_bytes / size))):
        weight = mx.random.normal((rows, columns)).astype(dtype)
        weights.append(mx.quantize(weight, group_size=64, bits=4) if packed else (weight,))
        mx.eval(weights[-1])
    vector = mx.random.normal((1, columns)).astype(dtype)

    def run() -> None:
        value = vector
        for weight in weights:
            if packed:
                value = mx.quantized_matmul(value, *weight, group_size=64, bits=4) * 1e-2
            else:
                value = value @ weight[0].T
        mx.eval(value)

    spent = _best(run, clock) - launch * len(weights) * (2 if packed else 1)
    return size * len(weights) / max(spent, 1e-9)


def _launch_seconds(chain: int, clock: Callable[[], float]) -> float:
    """Of a kernel in a chain of small dependent ones."""
    norm = mx.ones((256,), _dtype())
    weight = nn.init.normal()(mx.zeros((256, 256), _dtype()))
    start = mx.random.normal((1, 256)).astype(_dtype())
    mx.eval(norm, weight, start)

    def run() -> None:
        value = start
        for _ in range(chain // 3):
            value = value + mx.fast.rms_norm(value, norm, 1e-6) @ weight
        mx.eval(value)

    return _best(run, clock) / (chain // 3 * 3)


def _flops(side: int, clock: Callable[[], float]) -> float:
    left = mx.random.normal((side, side)).astype(_dtype())
    right = mx.random.normal((side, side)).astype(_dtype())
    mx.eval(left, right)
    return 2 * side**3 / _best(lambda: mx.eval(left @ right), clock)
