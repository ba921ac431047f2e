"""Which adapter the running code uses: one for all rows, or one for each row of a batch."""

import weakref
from collections.abc import Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import mlx.core as mx

from ..errors import InputError, UnsupportedError


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
class Route:
    """Where the adapters of a batch's rows are in one stack.

    Attributes:
        slots: (rows,), the slot that each row reads.
        keep: (rows,), False where a row's adapter is not in the stack; None if all are.
    """

    slots: mx.array
    keep: mx.array | None

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

    def masked(self, z: mx.array) -> mx.array:
        """``z``, (rows, ...), with zeros where a row's adapter is elsewhere."""
        if self.keep is None:
            return z
        # Not a product with zero: another adapter's result for this row may be infinite.
        return mx.where(self.keep.reshape(-1, *[1] * (z.ndim - 1)), z, 0)


@dataclass(frozen=True, eq=False)
class Rows:
    """The adapter of each row of a batch, None for the base model.

    Attributes:
        adapters: One entry for each row, in the batch's order.
    """

    adapters: tuple[MountedAdapter | None, ...]
    _routes: dict[tuple[MountedAdapter, ...], Route | None] = field(default_factory=dict)

    def route(self, members: tuple[MountedAdapter, ...]) -> Route | None:
        """Route the rows to a stack's slots; None if the stack has no row's adapter.

        Most layers hold the same adapters in the same order, and share one route.
        """
        if members not in self._routes:
            slots = {adapter: slot for slot, adapter in enumerate(members)}
            found = [None if each is None else slots.get(each) for each in self.adapters]
            keep = [slot is not None for slot in found]
            self._routes[members] = (
                Route(
                    mx.array([slot or 0 for slot in found], dtype=mx.uint32),
                    None if all(keep) else mx.array(keep),
                )
                if any(keep)
                else None
            )
        return self._routes[members]


#: The adapter of the running code: None, a name, one mounted adapter, or one for each row.
Selection = str | MountedAdapter | Rows | None


def select(adapters: Sequence[MountedAdapter | None]) -> MountedAdapter | Rows | None:
    """The selection for a batch's rows: nothing or one adapter where all rows agree."""
    first = adapters[0] if adapters else None
    if all(each is first for each in adapters):
        return first
    return Rows(tuple(adapters))


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
    """Uses an adapter for the duration of a ``with`` block.

    Threads and asyncio tasks are apart: each sees only what it activated itself (a task starts with
    what its creator had). Blocks nest; None is the base model.

    Args:
        adapter: The name it was mounted under, what mounting returned, or None.

    Raises:
        InputError: On entry, if no model has an adapter of that name.
    """

    def __init__(self, adapter: Selection):
        self.adapter = adapter
        self._tokens: list[Token[Selection]] = []

    def __enter__(self) -> Self:
        name = self.adapter
        if isinstance(name, str) and not any(name in each.names for each in registries):
            raise InputError(f"no adapter {name!r} is mounted: mount_adapter_on_model does that")
        self._tokens.append(activate(name))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _active.reset(self._tokens.pop())
