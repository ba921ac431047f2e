"""Kind and size of a layer that LoRA adapts."""

from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from .adapter import LayerAdapter

LINEAR, EXPERTS, EMBEDDING = "linear layer", "stack of experts", "embedding"


@dataclass(frozen=True)
class Geometry:
    """One layer that LoRA can adapt.

    Attributes:
        kind: `LINEAR`, `EXPERTS` or `EMBEDDING`.
        inputs: Inputs of a linear layer, or rows of an embedding.
        outputs: Outputs of the layer.
        experts: Matrices in the stack; 1 otherwise.
        bits: Bits of a stored weight.
        group_size: Group size of its scales; 0 if it is not quantized.
    """

    kind: str
    inputs: int
    outputs: int
    experts: int
    bits: int
    group_size: int

    @property
    def per_rank(self) -> int:
        """Trainable parameters for each unit of rank."""
        return self.experts * (self.inputs + self.outputs)

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of ``a`` and ``b``."""
        if self.kind == EXPERTS:
            return (self.experts, rank, self.inputs), (self.experts, self.outputs, rank)
        return (self.inputs, rank), (rank, self.outputs)

    def holds(self, layer: LayerAdapter) -> bool:
        """Whether an update has this layer's shape."""
        return self.shapes(layer.rank) == (layer.a.shape, layer.b.shape)


def geometry(module: Any) -> Geometry | None:
    """The geometry of a layer without LoRA; None if LoRA cannot adapt it."""
    weight = module.get("weight") if isinstance(module, nn.Module) else None
    if weight is None:
        return None
    bits: int = weight.dtype.size * 8
    group_size: int = 0
    wide: int = weight.shape[-1]
    if "scales" in module:
        quantized: Any = module
        bits, group_size = quantized.bits, quantized.group_size
        wide = wide * 32 // bits
    if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
        return Geometry(EMBEDDING, weight.shape[0], wide, 1, bits, group_size)
    if isinstance(module, nn.Linear | nn.QuantizedLinear):
        return Geometry(LINEAR, wide, weight.shape[0], 1, bits, group_size)
    if weight.ndim == 3 and isinstance(module, _stacks()):
        return Geometry(EXPERTS, wide, weight.shape[1], weight.shape[0], bits, group_size)
    return None


def _stacks() -> tuple[type, ...]:
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    return (SwitchLinear, QuantizedSwitchLinear)
