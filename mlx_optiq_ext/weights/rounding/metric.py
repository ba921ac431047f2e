"""The second moment of a layer's inputs, prepared once for all tensors that share them."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from .elimination import Elimination, eliminated
from .threads import begun

#: Share of the mean diagonal that is added to the diagonal.
DAMPING = 0.02


@dataclass(frozen=True)
class Ordered:
    """Damped moments in the order of rounding, one of each weight of a batch.

    All but the orders are in the arrays of some steps.

    Attributes:
        columns: Columns in the order of rounding, (batch, in).
        groups: Groups in that order, (batch, groups).
        moment: The moments, (batch, in, in).
        coupling: By how much the errors of earlier columns move the target of each, (batch, in,
            in), strictly upper triangular; see `elimination`.
        unmixed: What turns that, one column of a group after the other, into where earlier groups
            move all of its targets at once, (batch, groups, group size, group size).
        inside: By how much what is rounded away of a column moves the later ones of its group,
            (batch, groups, group size, group size), strictly upper triangular.
        shares: Each column's share of its group's diagonal, (batch, in).
        variances: What other columns leave unexplained of each when it is rounded, (batch, in).
        size: Group size.
    """

    columns: np.ndarray
    groups: np.ndarray
    moment: Any
    coupling: Any
    unmixed: Any
    inside: Any
    shares: Any
    variances: Any
    size: int

    @property
    def slices(self) -> list[slice]:
        """The columns of each group."""
        return [slice(k * self.size, (k + 1) * self.size) for k in range(self.groups.shape[-1])]


@dataclass
class Metric:
    """What the error of a layer's weight is measured with.

    Attributes:
        moment: Second moment of the inputs, (in, in) of any positive scale; (experts, in, in) for
            stacked experts.
        cross: Moment of the reference's inputs with these; None without compensation.
    """

    moment: mx.array
    cross: mx.array | None = None
    _ordered: dict[tuple[int, int], Ordered] = field(default_factory=dict)
    _differences: dict[tuple[int, int], Any] = field(default_factory=dict)
    _begun: dict[int, list[Future[Elimination]]] = field(default_factory=dict)

    def begin(self, size: int) -> None:
        """Start to factor the moment for a group size, on other threads."""
        if size not in self._begun:
            moment = np.array(self.moment.astype(mx.float32))
            every = moment[None] if moment.ndim == 2 else moment
            self._begun[size] = [begun(_eliminated, one, size) for one in every]

    def ordered(self, size: int, steps: Any) -> Ordered:
        """The moment for a group size; computed once."""
        key = (size, id(steps))
        if key not in self._ordered:
            self.begin(size)
            every = [future.result() for future in self._begun.pop(size)]
            self._ordered[key] = _ordered(every, size, steps)
        return self._ordered[key]

    def made_up(self, weight: Any, found: Ordered, steps: Any) -> Any:
        """The change of a weight that brings these inputs' outputs to the reference's.

        Args:
            weight: (batch, out, in) in the arrays of ``steps``.
            found: From `ordered`.
            steps: Where to compute.

        Returns:
            (batch, out, in) in the order of rounding.
        """
        key = (found.size, id(steps))
        if key not in self._differences:
            self._differences[key] = self._difference(found, steps)
        return _solved(steps.product(weight, self._differences[key]), found, steps)

    def _difference(self, found: Ordered, steps: Any) -> Any:
        """The reference's moment less these inputs' own, its columns in the order of rounding."""
        assert self.cross is not None
        own, cross = (np.array(a.astype(mx.float32)) for a in (self.moment, self.cross))
        mean = max(float(np.diagonal(own).mean()), 1e-30)
        return steps.array(np.ascontiguousarray((cross - own)[None][..., found.columns[0]] / mean))


def _solved(rows: Any, found: Ordered, steps: Any) -> Any:
    """``rows`` times the inverse of the moment, by its factors, a group of columns at a time."""
    done: list[Any] = []
    slices = list(enumerate(found.slices))
    for group, at in reversed(slices):
        left = rows[..., at]
        if done:
            later = found.coupling[..., at, at.stop :].swapaxes(-1, -2)
            left = left - steps.product(steps.concatenate(done), later)
        done.insert(0, steps.product(left, found.unmixed[:, group].swapaxes(-1, -2)))
    rows, done = steps.concatenate(done) / found.variances[..., None, :], []
    for group, at in slices:
        left = rows[..., at]
        if done:
            earlier = found.coupling[..., : at.start, at]
            left = left - steps.product(steps.concatenate(done), earlier)
        done.append(steps.product(left, found.unmixed[:, group]))
    return steps.concatenate(done)


def damped(moment: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """A moment of mean diagonal 1, with some more on it."""
    mean = max(float(np.diagonal(moment).mean()), 1e-30)
    scaled = (moment / mean).astype(np.float32)
    scaled[np.diag_indices(len(scaled))] += damping + 1e-9
    return scaled


def _eliminated(moment: np.ndarray, size: int) -> Elimination:
    return eliminated(damped(moment), size)


def _ordered(every: list[Elimination], size: int, steps: Any) -> Ordered:
    def together(part: Callable[[Elimination], np.ndarray]) -> Any:
        return steps.array(np.stack([part(one) for one in every]))

    eye = np.eye(size)
    starts = range(0, len(every[0].columns), size)

    def unmixed(one: Elimination) -> np.ndarray:
        own = [one.coupling[i : i + size, i : i + size] for i in starts]
        return np.linalg.inv(eye + np.stack(own))

    def shares(one: Elimination) -> np.ndarray:
        diagonal = np.diagonal(one.moment).reshape(-1, size)
        return (diagonal / diagonal.sum(axis=1, keepdims=True)).ravel()

    turned = together(unmixed)
    return Ordered(
        columns=np.stack([one.columns for one in every]),
        groups=np.stack([one.groups for one in every]),
        moment=together(lambda one: one.moment),
        coupling=together(lambda one: one.coupling),
        unmixed=turned,
        inside=steps.array(eye) - turned,
        shares=together(shares),
        variances=together(lambda one: one.variances),
        size=size,
    )
