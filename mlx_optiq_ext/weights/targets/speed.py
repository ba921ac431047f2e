"""A plan for a speed instead of a size: the largest budget that is still fast enough."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ... import files
from ...errors import BudgetError
from ...latency import Chip, Header, Workload, find_chip, layout_of, predict
from ...model.hub import CONFIG, cached_folder
from ..candidates import Tensor
from ..plan import Plan
from ..plan_search import Precisions, Study, search, stored, variants
from ..precision import MODES, Precision

#: Precision of the search for the largest budget, in bits per weight.
STEP = 0.005


@dataclass(frozen=True)
class Target:
    """A required speed.

    Attributes:
        tps: Tokens per second, as ``mlx_lm.benchmark`` measures them without options.
        chip: The chip to predict for.
        config: The model's config.
        headers: Headers of the unquantized tensors.
    """

    tps: float
    chip: Chip
    config: Mapping[str, Any]
    headers: Mapping[str, Header]

    def check(self, tensors: Iterable[Tensor]) -> None:
        """Raise BudgetError if not even the smallest candidates are fast enough."""
        known = {t.path: t for t in tensors}
        fastest = self.speed(known, {path: t.precisions[0] for path, t in known.items()})
        if fastest < self.tps:
            raise BudgetError(
                f"{self.tps:g} tokens per second are out of reach on {self.chip.name}: with these "
                f"candidates this model is predicted to generate {fastest:.1f} at most"
            )

    def speed(self, tensors: Mapping[str, Tensor], precisions: Precisions) -> float:
        """Predicted tokens per second under a plan."""
        headers = dict(self.headers)
        settings: dict[str, Any] = {"bits": 4, "group_size": 64}
        for path, precision in precisions.items():
            if precision.quantized:
                settings[path] = precision.settings
                source = self.headers.get(f"{path}.weight")
                dtype = source.dtype if source is not None else "scale"
                headers |= _packed(tensors[path], precision, dtype)
        layout = layout_of({**self.config, "quantization": settings}, headers)
        return predict(layout, self.chip, Workload()).decode_tps


def target(path_or_repo: str, model: nn.Module, tps: float, chip: str) -> Target:
    """The target for a loaded model, before it is measured."""
    config = files.read_json(cached_folder(path_or_repo) / CONFIG, files.MODEL_CONFIG)
    arrays = tree_flatten(model.parameters())
    assert isinstance(arrays, list)
    headers = {
        path: Header(str(array.dtype), tuple(array.shape), array.nbytes)
        for path, array in arrays
        if isinstance(array, mx.array)
    }
    return Target(tps, find_chip(chip), config, headers)


def _packed(tensor: Tensor, precision: Precision, dtype: str) -> dict[str, Header]:
    *outer, inner = tensor.shape
    words, groups = inner * precision.bits // 32, inner // precision.group_size
    rows = math.prod(outer)
    mode = MODES[precision.mode]
    width = mode.scale_bits or tensor.dtype_bits
    scale = Header("U8" if mode.scale_bits else dtype, (*outer, groups), rows * groups * width // 8)
    headers = {
        f"{tensor.path}.weight": Header("U32", (*outer, words), 4 * rows * words),
        f"{tensor.path}.scales": scale,
    }
    return {**headers, f"{tensor.path}.biases": scale} if mode.biased else headers


def search_speed(
    study: Study,
    wanted: Target,
    *,
    protect: bool = False,
    say: Callable[[str], None] = print,
) -> Plan:
    """The plan of the largest budget whose model is predicted to be fast enough.

    Args:
        study: The measured model.
        wanted: The required speed.
        protect: Whether to protect both ends, as in `search`.
        say: Receives one line.

    Raises:
        BudgetError: Not even the smallest candidates are fast enough; the message says how fast
            they are.
    """
    tensors = {t.path: t for t in study.problem.tensors}
    smallest = {path: t.precisions[0] for path, t in tensors.items()}
    wanted.check(study.problem.tensors)
    low = study.size.bits_per_weight(stored(tensors.values(), smallest))
    high = study.size.bits_per_weight(
        stored(tensors.values(), {path: t.precisions[-1] for path, t in tensors.items()})
    )

    def fast(precisions: Precisions) -> bool:
        return wanted.speed(tensors, precisions) >= wanted.tps

    everything = fast(variants(study, high)["allocated"])
    if not everything:
        while high - low > STEP:
            middle = (low + high) / 2
            low, high = (
                (middle, high) if fast(variants(study, middle)["allocated"]) else (low, middle)
            )
        high = low
    while True:
        plan = search(study, high, protect=protect)
        if fast(plan.precisions):
            reached = wanted.speed(tensors, plan.precisions)
            why = ", which every plan meets: the largest one is taken," if everything else ":"
            say(
                f"[optiq] {reached:.1f} tokens per second predicted on {wanted.chip.name}, of "
                f"{wanted.tps:g}{why} a budget of {high:.3f} bits per weight"
            )
            return plan
        # The best plan of a budget may read more per token than the one that set it (experts).
        high -= STEP * 4
