"""Whether a model fits into memory."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .. import distributed
from ..errors import InputError
from .layers import decoder_layers

#: Share of memory above which weights are read layer by layer.
SHARE = 0.6
#: ``1`` always reads layer by layer, ``0`` never.
SWITCH = "MLX_OPTIQ_EXT_STREAM"


def streams(model: nn.Module, limit: int | None = None) -> bool:
    """Whether a model, in the dtype it is stored in, is to be read layer by layer.

    All processes do so if one of them has to.

    Args:
        model: Not evaluated.
        limit: Bytes that this process may take; None for `memory_limit`.

    Raises:
        InputError: The switch is set to something else than 0 and 1.
    """
    wanted = os.environ.get(SWITCH, "")
    if wanted not in ("", "0", "1"):
        raise InputError(f"{SWITCH}={wanted} is neither 0 (never) nor 1 (always): unset it")
    most = SHARE * (memory_limit() if limit is None else limit)
    own = wanted == "1" or (wanted != "0" and resident_bytes(model) > most)
    return any(distributed.gathered(own and bool(decoder_layers(model))))


def resident_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights while it is measured: on a CPU with a float32 copy."""
    return sum(_needed(array) for _, array in _arrays(model))


def block_bytes(model: nn.Module) -> int:
    """Stored bytes of the largest decoder layer."""
    layers = decoder_layers(model)
    return max((sum(a.nbytes for _, a in _arrays(layer)) for layer in layers), default=0)


def _needed(array: mx.array) -> int:
    if mx.default_device() != mx.Device(mx.cpu) or array.dtype not in (mx.float16, mx.bfloat16):
        return array.nbytes
    return array.nbytes + array.size * 4


def _arrays(module: nn.Module) -> list[tuple[str, mx.array]]:
    found = tree_flatten(module.parameters())
    assert isinstance(found, list)
    return found


def memory_limit() -> int:
    """Bytes that this process may use: the smallest limit of device, system and shell."""
    return min(_limits())


def _limits() -> Iterator[int]:
    yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    from mlx_optiq_compat import symbols

    with contextlib.suppress(RuntimeError):  # raised where there is no Metal
        working_set = symbols.device_info().get("max_recommended_working_set_size")
        if isinstance(working_set, int) and working_set > 0:
            yield working_set
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
            soft = resource.getrlimit(kind)[0]
            if soft != resource.RLIM_INFINITY:
                yield soft
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups, version 2 and 1
        with contextlib.suppress(OSError, ValueError):
            yield int(Path("/sys/fs/cgroup", name).read_text())
