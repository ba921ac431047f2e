"""What a conversion gives to stock's: the model as it was planned, and the refined values."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import OptiqError
from ..model.loading import cast, unpacked


def ready(model: nn.Module, config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """Bring a model that stock loaded into the state in which the planned one was measured.

    Args:
        model: As ``quantize_model`` gets it; its layers may be replaced.
        config: The model's config.
        dtype: To convert to, as of the planned conversion.

    Returns:
        The config without entries of a quantization that the model does not have.
    """
    if unpacked(model):
        cast(model, config, dtype)
    stale = ("quantization", "quantization_config", "quantize_activations")
    return {key: value for key, value in config.items() if key not in stale}


def put(
    model: nn.Module,
    refined: Mapping[str, tuple[mx.array, ...]],
    parameters: Mapping[str, mx.array] | None = None,
) -> None:
    """Replace the values that ``quantize_model`` stored in a model by the refined ones.

    Args:
        model: As ``quantize_model`` returns it.
        refined: Tensor path -> words, scales and biases.
        parameters: Parameter path -> value of what is not quantized; stored in the model's dtype.

    Raises:
        OptiqError: A tensor is missing, or quantized in another way.
    """
    modules = dict(model.named_modules())
    for path, quantized in refined.items():
        for name, value in zip(("weight", "scales", "biases"), quantized, strict=True):
            stored = _stored(modules, f"{path}.{name}", "refined", value)
            if stored.dtype != value.dtype:
                raise _differs(f"{path}.{name}", "refined", value, stored)
            modules[path][name] = value
    for path, value in (parameters or {}).items():
        stored = _stored(modules, path, "tuned", value)
        module, _, name = path.rpartition(".")
        modules[module][name] = value.astype(stored.dtype)


def _stored(modules: Mapping[str, nn.Module], path: str, done: str, value: mx.array) -> mx.array:
    module, _, name = path.rpartition(".")
    stored = modules[module].get(name) if module in modules else None
    if stored is None or stored.shape != value.shape:
        raise _differs(path, done, value, stored)
    return stored


def _differs(path: str, done: str, value: mx.array, stored: mx.array | None) -> OptiqError:
    made = "nothing" if stored is None else f"{stored.dtype} {stored.shape}"
    return OptiqError(
        f"{path} was {done} as {value.dtype} {value.shape}, but mlx-lm made {made} of it: please "
        "report this with your mlx-lm version"
    )
