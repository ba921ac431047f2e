"""Saves an adapter; every file is written completely or not at all."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from ... import files
from ...errors import InputError, OptiqError
from ..adapter import LayerAdapter
from . import peft_writing
from .location import CONFIG, MLX_LM_WEIGHTS, NOTES, PEFT_WEIGHTS
from .peft_writing import Naming


@dataclass(frozen=True)
class Checkpoint:
    """Where and how one training saves its adapter.

    Attributes:
        folder: The adapter's folder.
        ranks: Path -> rank.
        scale: Scale of every layer.
        rank: The rank that set the budget.
        naming: PEFT's names.
        notes: Content of ``optiq_lora_config.json``.
        base_model: The base model's folder or name.
        dropout: Dropout during training.
        dora: Whether it is DoRA.
    """

    folder: Path
    ranks: Mapping[str, int]
    scale: float
    rank: int
    naming: Naming
    notes: Mapping[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    dropout: float = 0.0
    dora: bool = False

    @property
    def widest(self) -> int:
        """The largest rank, which the others are padded to."""
        return max(self.ranks.values())

    def check_folder(self) -> None:
        """Refuse a folder whose adapter would not load with this one's config.

        Raises:
            InputError: It holds an adapter of another shape.
        """
        if not (self.folder / MLX_LM_WEIGHTS).exists():
            return
        notes = self.folder / NOTES
        before = files.read_json(notes) if notes.exists() else {}
        same = isinstance(before, dict) and all(
            before.get(key) == self.notes.get(key) for key in ("ranks", "scale", "dora")
        )
        if not same:
            raise InputError(
                f"{self.folder} holds an adapter of another training, which a first checkpoint "
                "would leave without its config: remove it or name another --adapter-path"
            )

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write ``adapter_config.json`` with mlx-lm's keys and PEFT's, and our notes.

        Args:
            config: mlx-lm's keys.
        """
        scales = {self.naming.path(path): (rank, self.scale) for path, rank in self.ranks.items()}
        left_out = self.notes.get("not_in_peft", ())
        for path in left_out:
            scales.pop(self.naming.path(path), None)
        own = {}
        if scales:
            own = peft_writing.config(
                scales,
                self.naming,
                rank=self.rank,
                base_model=self.base_model,
                dropout=self.dropout,
                dora=self.dora,
            )
        files.write_json(self.folder / NOTES, dict(self.notes))
        files.write_json(self.folder / CONFIG, dict(sorted({**config, **own}.items())))

    def write(self, path: Path, tensors: Mapping[str, mx.array]) -> None:
        """Write one checkpoint; the final name also gets its PEFT form.

        Args:
            path: ``adapters.safetensors`` or a numbered one beside it.
            tensors: ``<path>.lora_a``, ``.lora_b`` and ``.m`` at their own ranks.

        Raises:
            OptiqError: A tensor is not finite, or the disk is full. Existing files stay.
        """
        check_finite(tensors, path)
        layers = collect(tensors, self.scale)
        write_tensors(path, padded(layers, self.widest, self.scale))
        if path.name != MLX_LM_WEIGHTS:
            return
        kept, _ = peft_writing.split(layers, self.naming)
        if kept:
            write_tensors(self.folder / PEFT_WEIGHTS, peft_writing.tensors(kept, self.naming))


def collect(tensors: Mapping[str, mx.array], scale: float) -> dict[str, LayerAdapter]:
    """The layers of flat tensors with one scale."""
    paths = sorted({name.rpartition(".")[0] for name in tensors})
    return {
        path: LayerAdapter(
            tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"], scale, tensors.get(f"{path}.m")
        )
        for path in paths
    }


def padded(layers: Mapping[str, LayerAdapter], rank: int, scale: float) -> dict[str, mx.array]:
    """The tensors of ``adapters.safetensors``: one rank and one scale for all."""
    found = {}
    for path, layer in layers.items():
        wide = layer.padded(rank, scale)
        found |= {f"{path}.lora_a": wide.a, f"{path}.lora_b": wide.b}
        if wide.magnitude is not None:
            found[f"{path}.m"] = wide.magnitude
    return found


def check_finite(tensors: Mapping[str, mx.array], path: Path) -> None:
    """Raise OptiqError if a trained number is NaN or infinite."""
    for name, tensor in tensors.items():
        if not mx.isfinite(tensor).all().item():
            raise OptiqError(
                f"the training diverged: {name} holds NaN or infinity. {path} was not written and "
                "earlier checkpoints stay; train with a lower learning rate or scale"
            )


def write_tensors(path: Path, tensors: Mapping[str, mx.array]) -> None:
    """Write a safetensors file completely or not at all.

    Raises:
        OptiqError: The file cannot be written; an existing one stays.
    """
    try:
        with files.replaced(path) as temporary:
            mx.save_safetensors(str(temporary), dict(tensors), {"format": "pt"})
    except (OSError, RuntimeError) as error:
        raise OptiqError(
            f"could not write {path} ({error}): free some disk space; what was there stays"
        ) from error
