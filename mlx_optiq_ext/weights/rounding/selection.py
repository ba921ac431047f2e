"""Where rounding computes: numpy, or a GPU whose kernels were checked against it."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import mlx.core as mx

from ... import kernels
from ..precision import Precision
from .device import Device
from .feedback import round_weight
from .host import Host
from .metric import Metric
from .steps import Steps

HOST = Host()


def current(say: Callable[[str], None] = print, *, exact: bool = True) -> Steps:
    """The steps on MLX's default device.

    Args:
        say: Told in one line if a GPU cannot be used.
        exact: Whether a GPU's products keep 19 bits of their factors; see `Device`.
    """
    name = kernels.current().name
    found = HOST if name == "cpu" else _gpu(name)
    if found is None:
        say(f"The rounding kernels do not work on this {name} device: rounding on the CPU")
    if found is None or isinstance(found, Host):
        return HOST
    return found if found.exact == exact else replace(found, exact=exact)


@cache
def _gpu(name: str) -> Device | None:
    from mlx_optiq_compat import symbols

    make = symbols.kernel_compiler(name)
    if make is None:
        return None
    device = Device(name, make)
    return device if agrees(device) else None


def agrees(device: Steps) -> bool:
    """Whether a device rounds a small weight as well as numpy does.

    A kernel that a driver does not compile, or compiles to something else, must not decide what is
    stored.
    """
    weight = mx.random.normal((8, 128), key=mx.random.key(0))
    rows = mx.random.normal((256, 128), key=mx.random.key(1)) + 1.0
    moment, precision = rows.T @ rows / 256, Precision(3, 64)

    def left(steps: Steps) -> float:
        words, scales, biases = round_weight(
            weight, Metric(moment), precision, mx.float32, steps=steps
        )
        error = weight - mx.dequantize(words, scales, biases, group_size=64, bits=3)
        return float(((error @ moment) * error).sum())

    try:
        return left(device) <= 1.01 * left(HOST)
    except (RuntimeError, ValueError):  # what MLX raises where a kernel does not compile or run
        return False
