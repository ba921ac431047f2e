"""What each format costs each layer's keys and values, and the plan that fits a budget.

Each side of each layer is packed alone at one format, its anchor, and the KL divergence of the
final logits measured over all positions of long windows. The other formats follow by how much they
change that layer's output, relative to the anchor: one layer is run for each, not the model.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from ... import distributed
from ...errors import BudgetError, UnsupportedError
from ...planning.allocation import allocate
from ...planning.journal import Journal
from ..formats import Affine, Format
from ..formats.affine import candidates
from ..layout import Slot, owners
from ..plan import LayerFormat
from .replay import Replay

#: Width of the anchor: coarse enough to stand out of rounding noise.
ANCHOR = 3
#: Width beyond which each bit is taken to quarter the error, as it does for a uniform quantizer.
FINEST = 4
#: Counted up when costs are measured in another way.
VERSION = 2

#: A decoder layer and whether it is its keys ("k") or values ("v").
Side = tuple[int, str]


@dataclass(frozen=True)
class Costs:
    """What was measured.

    Attributes:
        slots: Decoder layer -> the caches that it writes to, mostly one.
        shapes: Side -> (1, heads, positions, dim) of each of them at the measured length.
        costs: Side -> format -> expected KL in nats per token.
        held_out: Runs to judge whole plans on.
    """

    slots: Mapping[int, tuple[Slot, ...]]
    shapes: Mapping[Side, list[tuple[int, ...]]]
    costs: Mapping[Side, Mapping[Affine, float]]
    held_out: list[Replay]

    def elements(self, side: Side) -> int:
        """Numbers that one side holds at the measured length."""
        return sum(math.prod(shape) for shape in self.shapes[side])

    def bits_per_element(self, choice: Mapping[Side, Format]) -> float:
        """Stored bits over elements of a whole choice."""
        total = sum(self.elements(side) for side in choice)
        return sum(self.elements(s) * f.bits_per_element for s, f in choice.items()) / total

    def formats(self, choice: Mapping[Side, Format]) -> dict[Slot, LayerFormat]:
        """A choice as formats of the caches."""
        layers = as_layers(choice)
        return {slot: layers[layer] for layer in layers for slot in self.slots[layer]}


def measure(
    model: nn.Module,
    windows: np.ndarray,
    held_out: np.ndarray,
    *,
    key: dict[str, Any] | None = None,
    rotation: bool = True,
    progress: bool = True,
) -> Costs:
    """Cost every format of every layer's keys and values; each rank measures some of them.

    Args:
        model: An mlx-lm model in the dtype to compute in.
        windows: int32 (n, length) to measure on, as long as the contexts to serve.
        held_out: int32 (n, length) to judge plans on.
        key: Identifies the model; measurements are kept under it. None keeps none.
        rotation: Whether to consider rotated formats.
        progress: Whether to show a progress bar.

    Raises:
        UnsupportedError: No layer keeps keys and values that MLX can pack.
    """
    found = owners(model)
    journal = Journal(
        key
        and {**key, "kv": VERSION, "tokens": [int(t) for t in windows.ravel()], "anchor": ANCHOR}
    )
    runs = [Replay(model, mx.array(window)[None], found) for window in windows]
    slots: dict[int, tuple[Slot, ...]] = {}
    for slot, layer in found.items():
        slots[layer] = (*slots.get(layer, ()), slot)
    shapes = {
        (layer, which): [runs[0].shapes[slot][which == "v"] for slot in own]
        for layer, own in slots.items()
        for which in "kv"
    }
    shapes = {side: found for side, found in shapes.items() if candidates(_dims(found))}
    if not shapes:
        raise UnsupportedError(
            "no layer of this model keeps keys and values in groups that MLX can pack: leave "
            "--optiq-kv-budget out"
        )
    costs: dict[Side, dict[Affine, float]] = {}
    for side in tqdm(
        distributed.share(list(shapes)), desc="Measuring keys and values", disable=not progress
    ):
        formats = candidates(_dims(shapes[side]), rotation=rotation)
        costs[side] = _costs(runs, slots[side[0]], side, formats, journal)
    journal.exchange()
    parts = {side: found for part in distributed.gathered(costs) for side, found in part.items()}
    costs = {side: parts[side] for side in shapes}
    judges = [Replay(model, mx.array(window)[None], found) for window in held_out]
    return Costs(slots, shapes, costs, judges)


def _dims(shapes: list[tuple[int, ...]]) -> set[int]:
    return {shape[3] for shape in shapes}


def _costs(
    runs: list[Replay],
    slots: tuple[Slot, ...],
    side: Side,
    formats: list[Affine],
    journal: Journal,
) -> dict[Affine, float]:
    known = {f: journal.get(_key(side, f)) for f in formats}
    if all(cost is not None for cost in known.values()):
        return {f: cost or 0.0 for f, cost in known.items()}

    def packed(format: Affine) -> dict[Slot, LayerFormat]:
        return dict.fromkeys(slots, as_layers({side: format})[side[0]])

    anchor = next(f for f in formats if f.bits == ANCHOR)
    kl = float(np.mean([run.divergence(packed(anchor)) for run in runs]))
    measured = {f: min(f.bits, FINEST) for f in formats}
    errors = {f: runs[0].error(packed(f)) for f in formats if f.bits <= FINEST}
    unit = errors[anchor]
    if not unit:  # the layer cannot be run alone: by the error of a uniform quantizer
        errors = {f: 4.0**-f.bits * (f.group_size or 64) ** 0.5 for f in errors}
        unit = errors[anchor]
    found = {
        f: kl * (errors[replace(f, bits=bits)] or 0.0) / unit * 4.0 ** (bits - f.bits)
        for f, bits in measured.items()
    }
    for format, cost in found.items():
        journal.add(_key(side, format), cost)
    return found


def _key(side: Side, format: Affine) -> list[Any]:
    return [*side, asdict(format)]


def choose(
    found: Costs,
    budget: float,
    *,
    allow: Callable[[Affine], bool] = lambda _: True,
    alike: bool = False,
) -> dict[Side, Affine]:
    """The cheapest formats within a budget of stored bits per element.

    Args:
        found: What was measured.
        budget: Stored bits per element, scales and biases included.
        allow: Which formats may be taken.
        alike: Whether keys and values of a layer must share one format.

    Raises:
        BudgetError: No choice fits; the message names the range.
    """
    groups: dict[Any, list[Side]] = {}
    for side in found.costs:
        groups.setdefault(side[0] if alike else side, []).append(side)
    sides = list(groups.values())
    options = [
        [f for f in found.costs[own[0]] if allow(f) and all(f in found.costs[s] for s in own)]
        for own in sides
    ]
    sizes = [
        [round(sum(found.elements(s) for s in own) * f.bits_per_element) for f in formats]
        for own, formats in zip(sides, options, strict=True)
    ]
    costs = [
        [sum(found.costs[s][f] for s in own) for f in formats]
        for own, formats in zip(sides, options, strict=True)
    ]
    total = sum(found.elements(side) for side in found.costs)
    least, most = (sum(pick(row) for row in sizes) / total for pick in (min, max))
    if budget < least:
        raise BudgetError(
            f"a KV budget of {budget:g} bits is too small: with scales and biases these layers "
            f"take from {least:.3f} to {most:.3f} bits per element"
        )
    picked = allocate(costs, sizes, math.floor(budget * total))
    return {side: options[i][picked[i]] for i, own in enumerate(sides) for side in own}


def judged(found: Costs, choice: Mapping[Side, Format]) -> float:
    """KL of a whole choice on the held-out windows, in nats per token."""
    formats = found.formats(choice)
    return float(np.mean([run.divergence(formats) for run in found.held_out]))


def as_layers(choice: Mapping[Side, Format]) -> dict[int, LayerFormat]:
    """Both sides of each layer together."""
    result: dict[int, LayerFormat] = {}
    for (layer, which), format in choice.items():
        known = result.get(layer, LayerFormat(None, None))
        result[layer] = replace(known, **{"keys" if which == "k" else "values": format})
    return result
