"""An adapter's layers as a table for the terminal."""

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from .adapter import Adapter, LayerAdapter

#: Width of the longest bar.
WIDE = 24


def table(adapter: Adapter) -> str:
    """Path, bits, rank, parameters and norm of each layer's update, with a bar for its rank.

    Bits are known for adapters trained with ``--optiq-*`` options.
    """
    noted = adapter.notes.get("bits")
    bits: Mapping[str, Any] = noted if isinstance(noted, dict) else {}
    widest = max(layer.rank for layer in adapter.layers.values())
    path_width = max(len("layer"), *map(len, adapter.layers))
    rows = [f"{'layer':{path_width}}  bits  rank  parameters  norm of BA"]
    for path, layer in adapter.layers.items():
        bar = "#" * max(1, round(layer.rank / widest * WIDE))
        rows.append(
            f"{path:{path_width}}  {bits.get(path, '-'):>4}  {layer.rank:>4}  "
            f"{layer.parameters:>10,}  {norm(layer):>10.4g}  {bar}"
        )
    total = sum(layer.parameters for layer in adapter.layers.values())
    return "\n".join([*_head(adapter, total), *rows])


def _head(adapter: Adapter, total: int) -> list[str]:
    scales = sorted({layer.scale for layer in adapter.layers.values()})
    spread = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
    kind = "DoRA" if adapter.dora else "LoRA"
    lines = [
        f"{adapter.source}: {kind} in {adapter.form}'s form on {adapter.base_model or 'a model'}",
        f"{len(adapter.layers)} layers, {total:,} parameters, scale {spread}",
    ]
    if "scaling" in adapter.notes:
        lines.append(
            f"ranks: {adapter.notes['scaling']}, at the budget of rank {adapter.notes.get('rank')} "
            f"everywhere ({adapter.notes.get('budget')} parameters)"
        )
    return lines


def norm(layer: LayerAdapter) -> float:
    """Frobenius norm of ``scale * a @ b``, over all experts, without forming the product."""
    a, b = layer.a.astype(mx.float32), layer.b.astype(mx.float32)
    if layer.stacked:
        a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
    # |AB|^2 = sum of (A^T A) * (B B^T).
    squared = ((a.swapaxes(-1, -2) @ a) * (b @ b.swapaxes(-1, -2))).sum()
    return abs(layer.scale) * math.sqrt(max(np.array(squared).item(), 0.0))
