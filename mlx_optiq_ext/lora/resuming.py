"""Checks the files that a stock training would resume from or overwrite."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import files
from ..errors import InputError
from .forms.location import MLX_LM_WEIGHTS, NOTES


def check_stock_training(resume: Path | None, folder: Path, rank: Any) -> None:
    """Refuse adapters of ours or PEFT's that a training without our options would spoil.

    Args:
        resume: The file to go on from.
        folder: Where the adapter goes.
        rank: The rank of every layer.

    Raises:
        InputError: The file holds PEFT's names, which mlx-lm passes over, or has a rank of its own
            for each layer; or the folder holds such an adapter.
    """
    if resume is not None and resume.is_file():
        _check_form(resume)
        scaling = _other_ranks(resume.parent, rank)
        if scaling is not None:
            raise InputError(
                f"--resume-adapter-file {resume} has a rank of its own for each layer ({NOTES} "
                f"beside it), which this training would lose: add --optiq-rank-scaling {scaling}"
            )
    if (folder / MLX_LM_WEIGHTS).is_file():
        scaling = _other_ranks(folder, rank)
        if scaling is not None:
            raise InputError(
                f"--adapter-path {folder} holds an adapter with a rank of its own for each layer, "
                f"whose {NOTES} would not go with this training's: add --optiq-rank-scaling "
                f"{scaling}, or name another folder"
            )


def _check_form(path: Path) -> None:
    try:
        stored = files.read_header(path).tensors
    except InputError:
        return  # stock reports what is wrong
    foreign = next(
        (name for name in stored if ".lora_A." in name or ".lora_embedding_A" in name), ""
    )
    if foreign:
        raise InputError(
            f"--resume-adapter-file {path} is in PEFT's form ({foreign}), which mlx-lm would pass "
            f"over and start from scratch: write mlx-lm's form with --optiq-export-peft "
            f"{path.parent} and go on from its {MLX_LM_WEIGHTS}"
        )


def _other_ranks(folder: Path, rank: Any) -> str | None:
    """The rank scaling of an adapter of ours with other ranks than this one, or None."""
    if not (folder / NOTES).is_file():
        return None
    notes = files.read_json(folder / NOTES)
    ranks = notes.get("ranks") if isinstance(notes, Mapping) else None
    if not isinstance(ranks, Mapping) or all(each == rank for each in ranks.values()):
        return None
    return str(notes.get("asked", "constant"))
