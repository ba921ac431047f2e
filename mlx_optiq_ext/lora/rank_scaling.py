"""A rank for each layer, within the trainable parameters of one constant rank."""

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import files
from ..errors import InputError
from ..model.config import place
from ..planning.calibration import SAMPLED
from .geometry import Geometry

CONSTANT, BY_BITS, BY_KL = "constant", "by_bits", "by_kl"
SCALINGS = (CONSTANT, BY_BITS, BY_KL)

#: Limits of a layer's KL relative to the median, as in mlx-optiq.
KL_RANGE = (0.5, 2.0)


def weights(
    scaling: str, layers: Mapping[str, Geometry], measured: Mapping[str, float]
) -> dict[str, float] | None:
    """The weight of each layer in the allocation of ranks.

    Args:
        scaling: One of `SCALINGS`. ``by_bits`` is in proportion to the bits a layer is stored in,
            ``by_kl`` to the KL divergence that its quantization causes, kept within `KL_RANGE` of
            the median.
        layers: Path -> geometry.
        measured: Path -> KL, where it is known.

    Returns:
        Path -> weight; None if all weights are equal.
    """
    if scaling == BY_BITS:
        found = {path: float(min(shape.bits, 16)) for path, shape in layers.items()}
    elif scaling == BY_KL and (known := [measured[p] for p in layers if measured.get(p, 0) > 0]):
        middle = statistics.median(known)
        low, high = KL_RANGE
        found = {p: min(max(measured.get(p, middle) / middle, low), high) for p in layers}
    else:
        return None
    return found if len(set(found.values())) > 1 else None


def allocate(
    layers: Mapping[str, Geometry], rank: int, weight: Mapping[str, float] | None
) -> dict[str, int]:
    """Whole ranks in proportion to weights, within the parameters that one rank would take.

    Args:
        layers: Path -> geometry.
        rank: The constant rank that sets the budget.
        weight: Path -> weight, or None for that rank everywhere.

    Returns:
        Path -> rank, at least 1 and never more than the layer's smaller side. The rest of the
        budget is less than one unit of rank of the smallest layer that could still grow.

    Raises:
        InputError: The rank is larger than a layer.
    """
    for path, shape in layers.items():
        if not 1 <= rank <= max(shape.inputs, shape.outputs):
            raise InputError(
                f"rank {rank} does not suit {path}, a {shape.kind} from {shape.inputs} to "
                f"{shape.outputs}: give a rank from 1 to {max(shape.inputs, shape.outputs)}"
            )
    if weight is None:
        return dict.fromkeys(layers, rank)
    most = {path: min(shape.inputs, shape.outputs) for path, shape in layers.items()}
    parameters = {path: shape.per_rank for path, shape in layers.items()}
    budget = rank * sum(parameters.values())

    def wanted(level: float) -> dict[str, float]:
        return {path: min(max(level * weight[path], 1.0), float(most[path])) for path in layers}

    low, high = 0.0, max(most[path] / weight[path] for path in layers)
    for _ in range(100):
        middle = (low + high) / 2
        if sum(parameters[path] * each for path, each in wanted(middle).items()) > budget:
            high = middle
        else:
            low = middle
    target = wanted(low)
    ranks = {path: math.floor(each + 1e-6) for path, each in target.items()}
    left = budget - sum(parameters[path] * each for path, each in ranks.items())
    while True:
        # Webster's method: of two layers of equal size, the one with more weight grows first.
        open_ = [path for path in layers if parameters[path] <= left and ranks[path] < most[path]]
        if not open_:
            return ranks
        best = max(open_, key=lambda path: weight[path] / (ranks[path] + 0.5))
        ranks[best] += 1
        left -= parameters[best]


def measured_kl(model: str, paths: Mapping[str, Any]) -> dict[str, float]:
    """KL per layer from ``optiq_metadata.json`` beside a model.

    Args:
        model: Its folder, or its name on the Hub if it is cached.
        paths: The layers to find; the file may use other prefixes.

    Returns:
        Path -> KL; empty without metadata, or where nothing was measured.

    Raises:
        InputError: The file is damaged.
    """
    path = metadata_path(model)
    if path is None:
        return {}
    content = files.read_json(path)
    if isinstance(content, dict) and "per_layer" not in content:
        content = content.get("optimization")
    entries = content.get("per_layer") if isinstance(content, dict) else None
    found = {}
    for name, entry in (entries if isinstance(entries, dict) else {}).items():
        value = entry.get("kl") if isinstance(entry, dict) else None
        own = place(name, paths)
        if own is None or value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
            raise InputError(
                f"{path}: kl of {name} is {files.shown(value)}: give a number from 0 on"
            )
        found[own] = float(value)
    return found


def measured_on(model: str) -> str | None:
    """The text that ``optiq_metadata.json`` beside a model was measured on, if it says so."""
    path = metadata_path(model)
    content = files.read_json(path) if path is not None else None
    data = content.get("calibration") if isinstance(content, dict) else None
    source = data.get("source") if isinstance(data, dict) else None
    if not isinstance(source, str):
        return None
    return source if source == SAMPLED else files.shown(source).strip("'")


def metadata_path(model: str) -> Path | None:
    """Where a model's ``optiq_metadata.json`` is, if it has one here."""
    name = "optiq_metadata.json"
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(model, name)
    except ValueError:
        return None
    return Path(cached) if isinstance(cached, str) else None
