"""A LoRA adapter as data, independent of its stored form."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

#: The two stored forms.
MLX_LM, PEFT = "mlx-lm", "peft"


@dataclass(frozen=True)
class LayerAdapter:
    """The low-rank update of one layer, in mlx-lm's orientation.

    For a linear layer, ``y + scale * (x @ a) @ b``.

    Attributes:
        a: (in, rank); for stacked experts (experts, rank, in); for an embedding (rows, rank).
        b: (rank, out); for stacked experts (experts, out, rank); for an embedding (rank, dims).
        scale: Factor on the update: PEFT's alpha over rank, or over the root of rank (rsLoRA).
        magnitude: DoRA's length of each output row, (out,); None for LoRA.
    """

    a: mx.array
    b: mx.array
    scale: float
    magnitude: mx.array | None = None

    @property
    def stacked(self) -> bool:
        """Whether it updates a stack of experts."""
        return self.a.ndim == 3

    @property
    def rank(self) -> int:
        """The LoRA rank of the update."""
        return self.a.shape[1 if self.stacked else -1]

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return self.a.size + self.b.size + (0 if self.magnitude is None else self.magnitude.size)

    def arrays(self) -> list[mx.array]:
        """All arrays of the update."""
        return [each for each in (self.a, self.b, self.magnitude) if each is not None]

    def cut(self, rank: int) -> "LayerAdapter":
        """The update with its first ``rank`` components only."""
        if self.stacked:
            a, b = self.a[:, :rank], self.b[..., :rank]
        else:
            a, b = self.a[:, :rank], self.b[:rank]
        return LayerAdapter(a, b, self.scale, self.magnitude)

    def padded(self, rank: int, scale: float) -> "LayerAdapter":
        """The update, padded with zero components to ``rank``, with another scale.

        The scales' ratio goes into ``b``, which then is float32.
        """
        more = rank - self.rank
        if self.stacked:
            a = mx.pad(self.a, [(0, 0), (0, more), (0, 0)])
            b = mx.pad(self.b, [(0, 0), (0, 0), (0, more)])
        else:
            a, b = mx.pad(self.a, [(0, 0), (0, more)]), mx.pad(self.b, [(0, more), (0, 0)])
        if scale != self.scale:
            b = b.astype(mx.float32) * (self.scale / scale)
        return LayerAdapter(a, b, scale, self.magnitude)


@dataclass(frozen=True)
class Adapter:
    """An adapter.

    Attributes:
        source: The folder or Hub repository that the user named.
        folder: The folder with its files.
        form: `MLX_LM` or `PEFT`.
        layers: Path of the adapted layer -> its update. `fit` replaces the stored paths by the
            model's.
        config: ``adapter_config.json``.
        notes: Our ``optiq_lora_config.json``; empty for adapters made elsewhere.
    """

    source: str
    folder: Path
    form: str
    layers: Mapping[str, LayerAdapter]
    config: Mapping[str, Any]
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dora(self) -> bool:
        """Whether the adapter is DoRA, which also scales each output row."""
        return any(layer.magnitude is not None for layer in self.layers.values())

    @property
    def base_model(self) -> str | None:
        """The base model that its files name, or None."""
        name = self.config.get("base_model_name_or_path") or self.config.get("model")
        return name if isinstance(name, str) else None

    @property
    def uniform(self) -> bool:
        """Whether all layers have one rank and one scale."""
        return len({(layer.rank, layer.scale) for layer in self.layers.values()}) <= 1
