"""Measures this machine with small kernels of decoding: what they read, compute and launch."""

import time
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from .chips import Chip
from .roofline import MATMUL

#: Bytes of the weights that each rate is measured over: more than any cache holds. A CPU unpacks
#: weights so slowly that fewer do.
READ_BYTES, CPU_READ_BYTES = 1 << 30, 1 << 26
#: Bits of quantized weights whose rates are measured beside that of unquantized ones.
BITS, GROUP = (2, 4, 8), 64
#: Shape of a product's weights: large enough for a fast GPU to outlast its launch.
ROWS, COLUMNS = 16384, 4096
#: Kernels in the chain that the launch time is measured over.
CHAIN = 300
#: Rows of the square product that the arithmetic is measured with.
SIDE, CPU_SIDE = 4096, 1024
REPEATS = 5


def calibrate(
    *,
    read_bytes: int | None = None,
    chain: int = CHAIN,
    side: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Chip:
    """Measure bandwidth, launch time and arithmetic of MLX's default device.

    Args:
        read_bytes: Of weights to read at each width; by default more than any cache holds.
        chain: Kernels in the dependent chain.
        side: Rows and columns of the product.
        clock: Seconds.

    Returns:
        A chip whose ``launch_us`` is set: its numbers are taken as they are, without a family's
        efficiency. The best of a few runs counts.
    """
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    read_bytes = read_bytes or (CPU_READ_BYTES if on_cpu else READ_BYTES)
    side = side or (CPU_SIDE if on_cpu else SIDE)
    cuda = _cuda()
    family = "nvidia" if cuda else "apple"
    launch = _launch_seconds(chain, clock)
    # MLX's CUDA back end launches ahead of what runs.
    shown = 0.0 if cuda else launch
    element = 8 * _dtype().size
    rates = {
        bits + 2 * element / GROUP: _bytes_per_second(read_bytes, shown, clock, bits)
        for bits in BITS
    }
    rates[element] = _bytes_per_second(read_bytes, shown, clock)
    flops = _flops(side, clock)
    return Chip(
        id="this-machine",
        name=_device_name(),
        family=family,
        bandwidth_gbs=round(rates[element] / 1e9, 3),
        # The roofline takes a family's share of the peak for a prompt's products.
        tflops=round(flops / MATMUL[family] / 1e12, 4),
        launch_us=round(launch * 1e6, 3),
        rates_gbs=tuple((bits, round(rate / 1e9, 3)) for bits, rate in rates.items()),
        overlapped=cuda,
        source="measured by --optiq-calibrate-chip",
    )


def summary(chip: Chip) -> str:
    """What was measured, on one line."""
    assert chip.launch_us is not None
    packed = ", ".join(f"{rate:.1f} at {bits:g} bits" for bits, rate in chip.rates_gbs[:-1])
    return (
        f"[optiq] {chip.name}: {chip.bandwidth_gbs:.1f} GB/s ({packed} per weight), "
        f"{chip.launch_us:.2f} us a kernel, "
        f"{chip.tflops * MATMUL[chip.family]:.2f} TFLOP/s in a prompt's products"
    )


def _cuda() -> bool:
    return not mx.metal.is_available() and mx.default_device() != mx.Device(mx.cpu)


def _device_name() -> str:
    from mlx_optiq_compat import symbols

    if mx.default_device() == mx.Device(mx.cpu):
        return "MLX on a CPU"
    try:
        return str(symbols.device_info().get("device_name", "this machine"))
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


def _bytes_per_second(
    read_bytes: int, launch: float, clock: Callable[[], float], bits: int | None = None
) -> float:
    """Rate at which one-row products read many weights, quantized or not, as decoding does."""
    vector = mx.random.normal((1, COLUMNS)).astype(_dtype())
    weights, size = [], 0
    while not weights or size < read_bytes:
        weight = mx.random.normal((min(ROWS, read_bytes // 1024), COLUMNS)).astype(_dtype())
        parts = (weight,) if bits is None else mx.quantize(weight, group_size=GROUP, bits=bits)
        mx.eval(parts)
        weights.append(parts)
        size += sum(part.nbytes for part in parts)

    def product(parts: tuple[mx.array, ...]) -> mx.array:
        if bits is None:
            return vector @ parts[0].T
        weight, scales, biases = parts
        return mx.quantized_matmul(vector, weight, scales, biases, group_size=GROUP, bits=bits)

    spent = _best(lambda: mx.eval([product(parts) for parts in weights]), clock)
    return size / max(spent - launch * len(weights), 1e-9)


def _launch_seconds(chain: int, clock: Callable[[], float]) -> float:
    """Seconds of a kernel in a chain of small ones that depend on each other."""
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
