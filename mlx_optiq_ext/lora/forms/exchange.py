"""Converts an adapter between mlx-lm's and PEFT's form, in one folder that then has both."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ... import files
from ...errors import InputError
from ..adapter import MLX_LM, Adapter
from . import peft_writing
from .checkpoint import padded, write_tensors
from .location import CONFIG, MLX_LM_WEIGHTS, PEFT_WEIGHTS
from .peft_writing import Naming
from .reading import read_adapter


def convert(folder: Path) -> str:
    """Write the form that an adapter's folder does not have yet.

    Args:
        folder: Holds an adapter.

    Returns:
        A sentence that says what was written.

    Raises:
        InputError: The folder does not exist or has both forms, or the other form cannot hold it.
    """
    if not folder.is_dir():
        raise InputError(
            f"--optiq-export-peft {folder}: no such folder; download the adapter first"
        )
    adapter = read_adapter(folder)
    wanted = PEFT_WEIGHTS if adapter.form == MLX_LM else MLX_LM_WEIGHTS
    if (folder / wanted).exists():
        raise InputError(
            f"{folder} has both forms already: remove {wanted} to have it written again from the "
            "other"
        )
    return _to_peft(adapter) if adapter.form == MLX_LM else _to_mlx_lm(adapter)


def _to_peft(adapter: Adapter) -> str:
    naming = Naming.of(peft_writing.base_config(adapter.base_model), adapter.layers)
    kept, left_out = peft_writing.split(adapter.layers, naming)
    if not kept:
        raise InputError(
            f"{adapter.source} adapts stacked experts only, which PEFT has no layer for"
        )
    ranks = {path: (layer.rank, layer.scale) for path, layer in kept.items()}
    own = peft_writing.config(
        ranks,
        naming,
        rank=_rank(adapter),
        base_model=adapter.base_model,
        dora=adapter.dora,
    )
    write_tensors(adapter.folder / PEFT_WEIGHTS, peft_writing.tensors(kept, naming))
    _merge(adapter.folder, own)
    said = f"[optiq] wrote {PEFT_WEIGHTS} with {len(kept)} layers to {adapter.folder}"
    if left_out:
        said += f"; PEFT has no layer for {', '.join(left_out)}"
    return said


def _to_mlx_lm(adapter: Adapter) -> str:
    naming = Naming.of(peft_writing.base_config(adapter.base_model), ())
    layers = {mlx_lm_path(path): layer for path, layer in adapter.layers.items()}
    if naming.tied and "lm_head" in layers:
        from ..fitting import without_twin

        layers = without_twin(layers, adapter.source)
    rank = max(layer.rank for layer in layers.values())
    scale = max(layer.scale for layer in layers.values())
    own = {
        "fine_tune_type": "dora" if adapter.dora else "lora",
        "num_layers": -1,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": 0.0,
            # Full paths, so that mlx-lm adapts these layers only.
            "keys": sorted(layers),
        },
    }
    write_tensors(adapter.folder / MLX_LM_WEIGHTS, padded(layers, rank, scale))
    _merge(adapter.folder, own)
    return f"[optiq] wrote {MLX_LM_WEIGHTS} with {len(layers)} layers to {adapter.folder}"


def mlx_lm_path(path: str) -> str:
    """mlx-lm's path for PEFT's: it wraps a vision-language model the other way round."""
    stem = "model.language_model."
    if path.startswith(stem):
        return f"language_model.model.{path.removeprefix(stem)}"
    return path


def _rank(adapter: Adapter) -> int:
    """The rank that set the budget, or the largest."""
    noted = adapter.notes.get("rank")
    largest = max(layer.rank for layer in adapter.layers.values())
    return noted if isinstance(noted, int) and not isinstance(noted, bool) else largest


def _merge(folder: Path, own: Mapping[str, Any]) -> None:
    before = files.read_json(folder / CONFIG)
    files.write_json(folder / CONFIG, dict(sorted({**before, **own}.items())))
