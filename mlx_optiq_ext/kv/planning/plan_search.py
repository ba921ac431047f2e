"""The KV plan that is best end to end within a budget."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import distributed
from ...errors import BudgetError
from ...planning.allocation import allocate
from ...planning.calibration import on
from ..formats import Affine, Format
from ..plan import LayerFormat
from .kv_sensitivity import KVSensitivity, Side, as_layers

#: What a side's letter stands for.
SIDES = {"k": "keys", "v": "values"}


@dataclass(frozen=True)
class Found:
    """A KV plan and its measurements.

    Attributes:
        choice: Side of a layer -> its format.
        bits_per_element: Stored bits with scales and biases, over all numbers that the caches hold.
        kl: KL of the whole plan on held-out sequences, in nats per token.
        name: Name of this plan among those that were tried.
        tried: Name -> (bits per element, held-out KL) of every plan that was tried.
        uniform: Name, bits per element and KL of the best uniform plan that fits, if one does.
        text: That all of it was measured and judged on, as `Calibration.source` has it.
    """

    choice: Mapping[Side, Affine]
    bits_per_element: float
    kl: float
    name: str
    tried: Mapping[str, tuple[float, float]]
    uniform: tuple[str, float, float] | None
    text: str = ""

    @property
    def layers(self) -> dict[int, LayerFormat]:
        """Decoder layer -> formats."""
        return as_layers(self.choice)

    def summary(self) -> str:
        """One line for the terminal."""
        where = f" {on(self.text)}" if self.text else ""
        text = (
            f"[optiq] KV plan: {self.bits_per_element:.3f} bits per element ({self.name}), KL on "
            f"held-out text{where}: {self.kl:.5f} nats per token"
        )
        if self.uniform is not None:
            name, bits, kl = self.uniform
            text += f"; uniform {name}: {bits:.3f} bits, KL {kl:.5f}"
        return text


def search(found: KVSensitivity, budget: float) -> Found:
    """Try a few plans on the held-out sequences and keep the best.

    Raises:
        BudgetError: No plan fits; the message names the range.
    """
    plans = {
        "allocated": choose(found, budget),
        "allocated, not rotated or transformed": choose(
            found, budget, allow=lambda f: not (f.rotated or f.transformed)
        ),
    }
    for floor in (3, 4):
        try:
            plans[f"allocated, {floor} bits or more"] = choose(
                found, budget, allow=lambda f, floor=floor: f.bits >= floor
            )
        except BudgetError:
            break
    with suppress(BudgetError):
        plans["allocated, K and V alike"] = choose(found, budget, alike=True)
    plans |= _uniform(found, budget)
    distinct: dict[str, Mapping[Side, Affine]] = {}
    for name, plan in plans.items():
        if plan not in distinct.values():
            distinct[name] = plan
    own = {name: judged(found, distinct[name]) for name in distributed.share(list(distinct))}
    measured = {name: kl for part in distributed.gathered(own) for name, kl in part.items()}
    tried = {name: (found.bits_per_element(p), measured[name]) for name, p in distinct.items()}
    best = min(tried, key=lambda name: tried[name][1])
    uniform = min(
        ((name, *tried[name]) for name in tried if name.startswith("k")),
        key=lambda entry: entry[2],
        default=None,
    )
    return Found(distinct[best], *tried[best], best, tried, uniform)


def choose(
    found: KVSensitivity,
    budget: float,
    *,
    allow: Callable[[Affine], bool] = lambda _: True,
    alike: bool = False,
) -> dict[Side, Affine]:
    """The formats of the least KL within a budget of stored bits per element.

    Args:
        found: The measurements.
        budget: Stored bits per element, scales and biases included.
        allow: Which formats may be taken.
        alike: Whether keys and values of a layer must share one format.

    Raises:
        BudgetError: No choice fits; the message names the range.
        InputError: A measurement is no finite number.
    """
    groups: dict[Any, list[Side]] = {}
    for side in found.kl:
        groups.setdefault(side[0] if alike else side, []).append(side)
    sides = list(groups.values())
    options = [
        [f for f in found.kl[own[0]] if allow(f) and all(f in found.kl[s] for s in own)]
        for own in sides
    ]
    sizes = [
        [round(sum(found.stored(s, f) for s in own)) for f in formats]
        for own, formats in zip(sides, options, strict=True)
    ]
    costs = [
        [sum(found.kl[s][f] for s in own) for f in formats]
        for own, formats in zip(sides, options, strict=True)
    ]
    total = sum(found.elements(side) for side in found.kl)
    least, most = (sum(pick(row) for row in sizes) / total for pick in (min, max))
    if budget < least:
        raise BudgetError(
            f"a KV budget of {budget:g} bits is too small: with scales and biases these layers "
            f"take from {least:.3f} to {most:.3f} bits per element"
        )
    names = [" and ".join(f"the {SIDES[which]} of layer {n}" for n, which in own) for own in sides]
    picked = allocate(costs, sizes, math.floor(budget * total), names=names)
    return {side: options[i][picked[i]] for i, own in enumerate(sides) for side in own}


def judged(found: KVSensitivity, choice: Mapping[Side, Format]) -> float:
    """KL of a whole choice on the held-out sequences, in nats per token."""
    formats = found.formats(choice)
    return float(np.mean([run.divergence(formats) for run in found.held_out]))


def _uniform(found: KVSensitivity, budget: float) -> dict[str, dict[Side, Affine]]:
    """The finest uniform plan that fits: plain, and each side mapped as it can be."""
    result: dict[str, dict[Side, Affine]] = {}
    kinds = [{(f.bits, f.group_size, _mapped(f)): f for f in kl} for kl in found.kl.values()]
    for mapped in (False, True):
        shared = set.intersection(*({k for k in kind if k[2] is mapped} for kind in kinds))
        plans = [
            {side: kind[key] for side, kind in zip(found.kl, kinds, strict=True)} for key in shared
        ]
        fitting = [plan for plan in plans if found.bits_per_element(plan) <= budget + 1e-9]
        if fitting:
            plan = max(fitting, key=found.bits_per_element)
            keys, values = (
                next((f for side, f in plan.items() if side[1] == which), None) for which in "kv"
            )
            result[f"k{keys}v{values}"] = plan
    return result


def _mapped(format: Affine) -> bool:
    return format.rotated or format.transformed
