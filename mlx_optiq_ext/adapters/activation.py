"""Which adapters the running code uses: the same for all rows, or its own for each row."""

import weakref
from collections.abc import Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import mlx.core as mx

from ..errors import InputError, UnsupportedError
from .mixture import Mixture, MountedAdapter, check_scale, mixed


@dataclass(frozen=True)
class Slot:
    """Where the adapter of all rows is in one stack.

    Attributes:
        index: The slot that all rows read.
        scale: Factor of its update.
    """

    index: int
    scale: float = 1.0

    def scaled(self, z: mx.array, dtype: mx.Dtype) -> mx.array:
        """An update times the scale, rounded once to ``dtype``."""
        if self.scale != 1:
            z = z.astype(mx.float32) * self.scale
        return z.astype(dtype)


@dataclass(frozen=True)
class Route:
    """Where the adapters of a batch's rows are in one stack.

    Attributes:
        slots: (rows,), the slot that each row reads.
        keep: (rows,), False where a row's adapter is not in the stack; None if all are.
        scales: (rows,), factors of the updates; None if all are 1.
    """

    slots: mx.array
    keep: mx.array | None
    scales: mx.array | None = None

    @property
    def rows(self) -> int:
        """Rows in the batch."""
        return self.slots.size

    def by_row(self, x: mx.array) -> mx.array:
        """Reshape ``x``, (..., in), to (rows, tokens, in).

        Raises:
            UnsupportedError: The leading dimensions of ``x`` do not fit the batch's rows.
        """
        if x.ndim == 3 and x.shape[0] == self.rows:
            return x
        if x.shape[0] % self.rows:
            raise UnsupportedError(
                f"a layer was called with {x.shape[0]} rows for a batch of {self.rows}: this model "
                "cannot mix adapters in one batch"
            )
        return x.reshape(self.rows, -1, x.shape[-1])

    def masked(self, z: mx.array, row: mx.array | None = None) -> mx.array:
        """``z``, (rows, ...), with zeros where a row's adapter is elsewhere.

        With ``row`` the leading dimensions of ``z`` are those of ``row``, which names their rows.
        """
        if self.keep is None:
            return z
        # Not a product with zero: another adapter's result for this row may be infinite.
        return mx.where(_spread(self.keep, row, z), z, 0)

    def scaled(self, z: mx.array, dtype: mx.Dtype, row: mx.array | None = None) -> mx.array:
        """Updates times the scales of their rows, rounded once to ``dtype``; see `masked`."""
        if self.scales is not None:
            z = z.astype(mx.float32) * _spread(self.scales, row, z)
        return z.astype(dtype)


def _spread(values: mx.array, row: mx.array | None, z: mx.array) -> mx.array:
    """Values of rows, in a shape that broadcasts to ``z``."""
    values = values if row is None else values[row]
    return values.reshape(*values.shape, *[1] * (z.ndim - values.ndim))


@dataclass(frozen=True, eq=False)
class Rows:
    """What each row of a batch uses, None for the base model.

    Attributes:
        adapters: One entry for each row, in the batch's order.
    """

    adapters: tuple[MountedAdapter | Mixture | None, ...]
    _routes: dict[tuple[MountedAdapter, ...], tuple[Route, ...]] = field(default_factory=dict)

    def routes(self, members: tuple[MountedAdapter, ...]) -> tuple[Route, ...]:
        """Route the rows to a stack's slots: once for each adapter that a row has in the stack.

        Most layers hold the same adapters in the same order, and share their routes.
        """
        if members not in self._routes:
            slots = {adapter: slot for slot, adapter in enumerate(members)}
            found = [slots_of(each, slots) for each in self.adapters]
            turns = range(max(map(len, found), default=0))
            self._routes[members] = tuple(_route(found, turn) for turn in turns)
        return self._routes[members]


def slots_of(
    selection: MountedAdapter | Mixture | None, slots: Mapping[MountedAdapter, int]
) -> list[Slot]:
    """Where the adapters of a selection are in one stack, in the order of their names."""
    if not isinstance(selection, Mixture):
        return [] if selection is None or selection not in slots else [Slot(slots[selection])]
    return [
        Slot(slots[x], s) for x, s in selection.members if not isinstance(x, str) and x in slots
    ]


def _route(found: Sequence[Sequence[Slot]], turn: int) -> Route:
    """The route to the slot that is each row's in one turn."""
    at = [each[turn] if turn < len(each) else None for each in found]
    scales = [1.0 if slot is None else slot.scale for slot in at]
    return Route(
        mx.array([0 if slot is None else slot.index for slot in at], dtype=mx.uint32),
        mx.array([slot is not None for slot in at]) if None in at else None,
        mx.array(scales) if any(scale != 1 for scale in scales) else None,
    )


#: What the running code uses: None, an adapter by name or as mounted, a sum, or one a row.
Selection = str | MountedAdapter | Mixture | Rows | None
#: Adapters of a sum with their scales.
Scales = Mapping[str, float] | Mapping[MountedAdapter, float] | Mapping[str | MountedAdapter, float]


def select(
    adapters: Sequence[MountedAdapter | Mixture | None],
) -> MountedAdapter | Mixture | Rows | None:
    """The selection for a batch's rows: nothing or one for all where the rows agree."""
    first = adapters[0] if adapters else None
    if all(each == first for each in adapters):
        return first
    return Rows(tuple(adapters))


def resolved(
    selection: Selection, names: Mapping[str, MountedAdapter]
) -> MountedAdapter | Mixture | Rows | None:
    """A selection with the adapters that one model has under the names.

    Raises:
        InputError: A name is mounted on another model only.
    """
    if not isinstance(selection, str | Mixture):
        return selection
    members = selection.members if isinstance(selection, Mixture) else ((selection, 1.0),)
    found = []
    for each, scale in members:
        if isinstance(each, str) and each not in names:
            raise InputError(f"adapter {each!r} is mounted on another model, not on this")
        found.append((names[each] if isinstance(each, str) else each, scale))
    return mixed(found)


class Registry(Protocol):
    """Adapters by name; ``mounting.Mounts`` implements it."""

    @property
    def names(self) -> Mapping[str, MountedAdapter]:
        """Its adapters by name."""
        ...


_active: ContextVar[Selection] = ContextVar("mlx_optiq_ext_adapter", default=None)
registries: "weakref.WeakSet[Registry]" = weakref.WeakSet()


def active() -> Selection:
    """The selection of the running thread or task."""
    return _active.get()


def activate(selection: Selection) -> Token[Selection]:
    """Select an adapter for the running thread or task from here on; see `AdapterActivation`."""
    return _active.set(selection)


class AdapterActivation:
    """Uses an adapter, or a sum of adapters, for the duration of a ``with`` block.

    Threads and asyncio tasks are apart: each sees only what it activated itself (a task starts with
    what its creator had). Blocks nest; None is the base model.

    Args:
        adapter: The name it was mounted under, what mounting returned, or None; a mapping of those
            to their scales for a sum, such as ``{"sql": 1.0, "tone": 0.5}``.
        scale: Factor of the adapter's update, or of the whole sum. 0 is the base model.

    Raises:
        InputError: A scale is no finite number or too large; on entry, if no model has an adapter
            of that name.
    """

    def __init__(self, adapter: Selection | Scales, scale: float = 1.0):
        check_scale(scale)
        if isinstance(adapter, Mapping):
            adapter = mixed([(each, check_scale(s) * scale) for each, s in adapter.items()])
        elif scale != 1:
            if isinstance(adapter, Rows):
                raise InputError("rows have scales of their own: give scale to each of them")
            members = adapter.members if isinstance(adapter, Mixture) else ((adapter, 1.0),)
            adapter = mixed([(each, s * scale) for each, s in members if each is not None])
        self.adapter: Selection = adapter
        self._tokens: list[Token[Selection]] = []

    def __enter__(self) -> Self:
        chosen = self.adapter
        members = chosen.members if isinstance(chosen, Mixture) else ((chosen, 1.0),)
        for name, _ in members:
            if isinstance(name, str) and not any(name in each.names for each in registries):
                raise InputError(
                    f"no adapter {name!r} is mounted: mount_adapter_on_model does that"
                )
        self._tokens.append(activate(chosen))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _active.reset(self._tokens.pop())
