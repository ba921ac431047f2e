"""Sums of adapters, each with a scale."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from ..errors import InputError

#: Largest scale of an adapter in a sum. Half precision overflows far beyond it.
LARGEST = 10.0


@dataclass(frozen=True, eq=False)
class MountedAdapter:
    """An adapter on a model. Every mount is an object of its own, compared by identity.

    Attributes:
        name: The name that selects it.
        version: Digest of its tensors: two mounts of the same weights have the same one.
        source: The folder or Hub repository it came from.
        nbytes: Bytes of its tensors.
    """

    name: str
    version: str
    source: str
    nbytes: int


@dataclass(frozen=True)
class Mixture:
    """A sum of adapters, each by a name or as it was mounted, with its scale.

    `mixed` makes one that does not depend on the order.

    Attributes:
        members: Adapters with scales other than 0.
    """

    members: tuple[tuple[str | MountedAdapter, float], ...]

    def mounted(self) -> Iterator[MountedAdapter]:
        """The adapters that are given as they were mounted."""
        return (each for each, _ in self.members if isinstance(each, MountedAdapter))


Named = TypeVar("Named", bound=str | MountedAdapter)


def mixed(members: Iterable[tuple[Named, float]]) -> Named | Mixture | None:
    """The sum of adapters, whatever their order: scales of the same one are added.

    Args:
        members: Adapters with their scales.

    Returns:
        A mixture; the adapter itself where it is one with scale 1, None where all scales are 0.

    Raises:
        InputError: A scale, or the sum of those of one adapter, is not finite, or beyond
            `LARGEST` either way.
    """
    scales: dict[Named, float] = {}
    for adapter, scale in members:
        scales[adapter] = scales.get(adapter, 0.0) + check_scale(scale)
    used = [(adapter, check_scale(scale)) for adapter, scale in scales.items() if scale]
    if len(used) == 1 and used[0][1] == 1:
        return used[0][0]
    return Mixture(tuple(sorted(used, key=_order))) if used else None


def check_scale(scale: float) -> float:
    """Return a usable scale as a float.

    Raises:
        InputError: It is no finite number, or beyond `LARGEST` either way.
    """
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not _usable(scale):
        raise InputError(
            f"the scale of an adapter must be a number from {-LARGEST:g} to {LARGEST:g}"
        )
    return float(scale)


def adapters_in(selection: MountedAdapter | Mixture | None) -> tuple[MountedAdapter, ...]:
    """The mounted adapters of one row's selection."""
    if isinstance(selection, Mixture):
        return tuple(selection.mounted())
    return () if selection is None else (selection,)


def signature(selection: MountedAdapter | Mixture) -> tuple[tuple[str, str, float], ...]:
    """Names, versions and scales of mounted adapters: what keys and values depend on."""
    members = selection.members if isinstance(selection, Mixture) else ((selection, 1.0),)
    return tuple((x.name, x.version, s) for x, s in members if isinstance(x, MountedAdapter))


def _usable(scale: float) -> bool:
    # Python compares integers of any size, and NaN is inside of nothing.
    return -LARGEST <= scale <= LARGEST and math.isfinite(scale)


def _order(member: tuple[str | MountedAdapter, float]) -> tuple[str, str]:
    adapter, _ = member
    return (adapter, "") if isinstance(adapter, str) else (adapter.name, adapter.version)
