"""Reads an adapter in any form, without a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ... import files
from ...errors import InputError
from ..adapter import MLX_LM, PEFT, Adapter, LayerAdapter
from . import peft_reading
from .location import FLOATS, HIGHEST_SCALE, NOTES, PEFT_WEIGHTS, Files, locate

_PARTS = ("lora_a", "lora_b", "m")


def read_adapter(source: str | Path, most: int | None = None) -> Adapter:
    """Read an adapter stored by mlx-lm, by PEFT, or with a rank of its own for each layer.

    Args:
        source: A folder, or a repository on the Hub.
        most: Tensors that its file may have; None for any number.

    Returns:
        The adapter. Its arrays are evaluated, so that another thread may use them; their dtypes
        are those of the file.

    Raises:
        InputError: Files are missing or damaged, contain numbers that are not finite, or are not a
            LoRA.
    """
    found = locate(source)
    tensors = read_tensors(found.weights, most)
    if found.weights.name == PEFT_WEIGHTS:
        form, layers = PEFT, peft_reading.layers(tensors, found.config, found.source)
    else:
        form, layers = MLX_LM, _layers(tensors, found)
    if not layers:
        raise InputError(f"{found.weights} holds no LoRA tensors: is it another model's file?")
    _check_magnitudes(layers, found, form)
    mx.eval([layer.arrays() for layer in layers.values()])
    return Adapter(found.source, found.folder, form, layers, found.config, found.notes)


def _check_magnitudes(layers: Mapping[str, LayerAdapter], found: Files, form: str) -> None:
    """Refuse DoRA without its magnitudes, which would run as plain LoRA."""
    dora = found.config.get("fine_tune_type") == "dora"
    said, part = (
        ("fine_tune_type is dora", "m")
        if form == MLX_LM
        else (
            "use_dora is set",
            "lora_magnitude_vector",
        )
    )
    if not (dora if form == MLX_LM else found.config.get("use_dora")):
        return
    for path, layer in layers.items():
        if layer.magnitude is None:
            raise InputError(
                f"{found.source}: {said} in adapter_config.json, but {path} has no {part} in "
                f"{found.weights.name}: the two files are of different adapters"
            )


def read_tensors(path: Path, most: int | None = None) -> dict[str, mx.array]:
    """Read a safetensors file whole, unless it has more than ``most`` tensors.

    Raises:
        InputError: It is missing, cut short, no safetensors, not of real numbers, of too many
            tensors, or holds NaN or infinity.
    """
    try:
        # MLX notices a truncated file only when an array is used.
        stored = files.read_header(path, most).tensors
    except InputError as error:
        raise InputError(
            f"{path} cannot be read ({error}): it is damaged or incomplete, fetch it again"
        ) from error
    if most is not None and len(stored) > most:
        raise InputError(
            f"{path} has {len(stored):,} tensors, and an adapter of this model has at most "
            f"{most:,}: is it for another model?"
        )
    for name, tensor in stored.items():
        if tensor.dtype not in FLOATS:
            raise InputError(
                f"{path}: {name} is of type {tensor.dtype}, LoRA's matrices are of "
                f"{', '.join(FLOATS)}: is it another file?"
            )
    try:
        tensors = mx.load(str(path))
        assert isinstance(tensors, dict)
        mx.eval(tensors)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): it is damaged or incomplete, fetch it again"
        ) from error
    for name, tensor in tensors.items():
        if mx.issubdtype(tensor.dtype, mx.floating) and not mx.isfinite(tensor).all():
            raise InputError(
                f"{path}: {name} holds NaN or infinity: the training diverged; use an earlier "
                "checkpoint, or train with a lower learning rate or scale"
            )
    return tensors


def _layers(tensors: Mapping[str, mx.array], found: Files) -> dict[str, LayerAdapter]:
    if found.config.get("fine_tune_type", "lora") == "full":
        raise InputError(
            f"{found.source} is a full fine-tune, not a LoRA adapter: only mlx-lm's own loading "
            "applies it"
        )
    scale = scale_of(found.config, found.source)
    parts: dict[str, dict[str, mx.array]] = {}
    for name, tensor in tensors.items():
        path, _, part = name.rpartition(".")
        if part not in _PARTS:
            raise InputError(
                f"{found.weights}: {name} is no LoRA tensor; such an adapter changes more than a "
                "LoRA does and cannot be loaded as one"
            )
        parts.setdefault(path, {})[part] = tensor
    ranks = _ranks(found)
    layers = {}
    for path in sorted(parts):
        layer = _layer(found.weights, path, parts[path], scale)
        layers[path] = _trimmed(layer, ranks.get(path), path, found)
    return layers


def scale_of(config: Mapping[str, Any], source: str) -> float:
    """The scale in mlx-lm's ``lora_parameters``."""
    parameters = config.get("lora_parameters")
    where = f"{source}: lora_parameters in adapter_config.json"
    fields = files.Fields(parameters if isinstance(parameters, dict) else {}, where)
    try:
        return fields.number("scale", -HIGHEST_SCALE, HIGHEST_SCALE)
    except InputError as error:
        raise InputError(
            f"{error}, the one it was trained with (mlx-lm's default is 20.0)"
        ) from error


def _layer(file: Path, path: str, parts: Mapping[str, mx.array], scale: float) -> LayerAdapter:
    if "lora_a" not in parts or "lora_b" not in parts:
        missing = "lora_a" if "lora_a" not in parts else "lora_b"
        raise InputError(f"{file}: {path} has no {missing}: the file is incomplete")
    layer = LayerAdapter(parts["lora_a"], parts["lora_b"], scale, parts.get("m"))
    if not consistent(layer):
        raise InputError(
            f"{file}: {path} has lora_a {layer.a.shape} and lora_b {layer.b.shape}, which do not "
            "go together: the file is damaged"
        )
    return layer


def consistent(layer: LayerAdapter) -> bool:
    """Whether the shapes of the two factors go together."""
    a, b = layer.a.shape, layer.b.shape
    if len(a) == len(b) == 3:
        return a[0] == b[0] and a[1] == b[2]
    return len(a) == len(b) == 2 and a[1] == b[0]


def _ranks(found: Files) -> Mapping[str, int]:
    """The true ranks of a file that was padded to the largest."""
    ranks = found.notes.get("ranks", {})
    whole = isinstance(ranks, dict) and all(
        isinstance(rank, int) and not isinstance(rank, bool) and rank > 0 for rank in ranks.values()
    )
    if not whole:
        raise InputError(f"{found.source}: ranks in {NOTES} is not a table of path to whole number")
    return ranks


def _beyond(layer: LayerAdapter, rank: int) -> mx.array:
    return layer.b[..., rank:] if layer.stacked else layer.b[rank:]


def _trimmed(layer: LayerAdapter, rank: int | None, path: str, found: Files) -> LayerAdapter:
    if rank is None or rank == layer.rank:
        return layer
    if rank > layer.rank or _beyond(layer, rank).any().item():
        raise InputError(
            f"{found.source}: {NOTES} gives {path} rank {rank}, but {found.weights.name} has rank "
            f"{layer.rank} there: the two files are of different trainings"
        )
    return layer.cut(rank)
