"""Which device MLX computes on, and whether kernels of our own run there."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx

#: The CUDA kernels multiply on tensor cores, as GPUs of this compute capability and later do.
CAPABILITY = 8


@dataclass(frozen=True, eq=False)
class Platform:
    """A device.

    Attributes:
        name: ``"cpu"``, ``"metal"`` or ``"cuda"``.
        compile: ``mx.fast.metal_kernel`` or ``mx.fast.cuda_kernel``, to run kernels of our own
            with; None to do without.
    """

    name: str
    compile: Callable[..., Any] | None = None


CPU = Platform("cpu")
_CPU_DEVICE = mx.Device(mx.cpu)


def current() -> Platform:
    """The platform of MLX's default device."""
    return CPU if mx.default_device() == _CPU_DEVICE else _gpu()


# Called at every layer of every token.
@cache
def _gpu() -> Platform:
    return detected("metal" if mx.metal.is_available() else "cuda")


def detected(name: str) -> Platform:
    """A GPU, with kernels of our own where they can run and are wanted.

    Args:
        name: ``"metal"`` or ``"cuda"``.
    """
    from mlx_optiq_compat import symbols

    make = symbols.kernel_compiler(name)
    if name == "metal":
        # The Metal kernel was never timed, so it must be switched on.
        wanted = os.environ.get("MLX_OPTIQ_EXT_METAL_KERNEL") == "1"
        return Platform(name, make if wanted else None)
    if make is None:
        return Platform(name)
    capability = symbols.device_info().get("compute_capability_major", CAPABILITY)
    return Platform(name, make if int(capability) >= CAPABILITY else None)
