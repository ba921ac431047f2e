"""The adapters that a server offers: known by name, mounted when asked for, evicted when idle."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

import mlx.nn as nn

from ... import distributed
from ..fitted import Fitted, most_tensors
from ..mixture import MountedAdapter
from ..mounting import Mounts, prepare_model_for_mounted_lora
from ..proof import rows_apart
from .copies import AdapterConflictError, AdaptersBusyError, Copy, State, Ticket
from .jobs import Jobs
from .reading import Caps, Offer, Pin, Reader
from .sets import Sets, check_number
from .states import States

Found = TypeVar("Found")


class Catalogue:
    """Adapters by name, of which at most ``limit`` are mounted at a time.

    Requests call `acquire` and `release` in threads of their own, which also read files. The thread
    that generates mounts adapters and takes them off, through `jobs`.

    Args:
        offers: Adapters that are offered from the start.
        limit: How many adapters are mounted at most; None for all.
        caps: How large an adapter may be; None for the default.
        patience: Seconds that a request waits while all that may be mounted are in use.

    Attributes:
        jobs: Work for the generation thread.
        routable: Whether rows of different adapters may share a batch of this model.
    """

    def __init__(
        self,
        offers: Iterable[Offer] = (),
        *,
        limit: int | None = None,
        caps: Caps | None = None,
        patience: float = 60.0,
    ):
        self.jobs = Jobs(self._drain)
        self.routable = True
        self._limit = limit
        self._patience = patience
        self._states = States(((each.name, each) for each in offers), limit, self._in_use)
        self._mounts: Mounts | None = None
        self._proven: frozenset[str] = frozenset()
        self._changed = threading.Condition()
        self._reader = Reader(caps or Caps())
        self._sets = Sets()

    def offers(self) -> list[Offer]:
        """The offered adapters, in the order in which they were added."""
        with self._changed:
            return list(self._states.offered().values())

    def states(self) -> dict[str, State]:
        """The state of every offered adapter, by name."""
        with self._changed:
            return {name: self._states.state(name) for name in self._states.offered()}

    def mounted(self) -> dict[str, tuple[MountedAdapter, int]]:
        """The mounted adapters by name, each with the number of requests and rows that use it."""
        mounts = self._mounts
        if mounts is None:
            return {}
        return {name: (each, mounts.uses(each)) for name, each in list(mounts.names.items())}

    def attach(self, model: nn.Module) -> None:
        """Mount the offered adapters, up to the limit, on the model that was loaded.

        Called by the generation thread; a reloaded model starts without adapters. All ranks attach
        together and must have the same weights.

        Raises:
            InputError: An adapter is damaged or for another model.
            Mismatch: Another rank has other adapters.
        """
        mounts = prepare_model_for_mounted_lora(model)
        if mounts is self._mounts:
            return
        self._reader.most = most_tensors(model)
        offers = self.offers()[: self._limit]
        with distributed.together():
            found = {each: self._begin(mounts, each) for each in offers}
            distributed.gathered(None)  # no rank continues before all have read their files
        weights = {f"weights of adapter {o.name}": pin.version for o, (_, pin) in found.items()}
        distributed.agree(**weights)
        for adapter in {each for each, _ in found.values()}:
            self._prove(mounts, adapter)
        self.routable = all(distributed.gathered(self.routable))
        with self._changed:
            self._states.attach({o.name: (a.version, a, pin) for o, (a, pin) in found.items()})
            self._mounts = mounts
            self._changed.notify_all()

    def acquire(self, name: str) -> MountedAdapter:
        """The adapter for one request, which stays mounted until `release`.

        Raises:
            UnknownAdapterError: The adapter is not offered.
            AdaptersBusyError: All that may be mounted stayed in use.
            InputError: The adapter's files are missing or damaged.
        """
        return self._acquire(time.monotonic() + self._patience, name)

    def acquire_all(self, names: Sequence[str]) -> list[MountedAdapter]:
        """Several adapters for one request, or none; fails as `acquire`, or where too many."""
        end = time.monotonic() + self._patience
        check_number(names, self._limit)
        with self._changed:
            if self._mounts and (copies := self._states.acquire_all(names)):
                return [self._use(copy) for copy in copies]
        return self._sets.collect(names, partial(self._acquire, end), self.release, _left(end))

    def release(self, *adapters: MountedAdapter) -> None:
        """End a request's use of adapters."""
        assert self._mounts is not None
        for adapter in adapters:
            self._mounts.done(adapter)

    def load(self, offer: Offer, *, replace: bool = False) -> MountedAdapter:
        """Offer an adapter from now on, and mount it.

        Args:
            offer: The adapter.
            replace: Whether it may replace an adapter of the same name. New requests then get the
                new weights; running ones keep the old, and this call waits a bounded time for them.

        Raises:
            AdapterConflictError: Its name is taken, just being loaded, or unloaded meanwhile.
            AdaptersBusyError: All that may be mounted stayed in use.
            InputError: Its files are damaged, or for another model.
        """
        end = time.monotonic() + self._patience
        with self._changed:
            ticket = self._states.load(offer.name, offer, replace=replace)
            old = ticket.entry.copy
        with self._leaving(ticket):
            self._await(lambda: self._mounts and self._states.start(ticket), end)
            copy = self._bring(ticket, offer, end)
        if old is not None and old is not copy:
            self._await(lambda: old.state is not State.DRAINING, end, late=False)
        return copy.adapter

    def unload(self, name: str) -> None:
        """Stop offering an adapter at once, and wait for the requests that use it.

        Raises:
            UnknownAdapterError: The adapter is not offered.
            AdaptersBusyError: Requests still use it. It is taken off when they end.
        """
        with self._changed:
            copy = self._states.unload(name)
            self._changed.notify_all()
        if copy is None:
            return
        end = time.monotonic() + self._patience
        if not self._await(lambda: copy.state is not State.DRAINING, end, late=False):
            raise AdaptersBusyError(
                f"adapter {name!r} is no longer offered, but requests still use it: it is taken "
                "off when they end"
            )

    @contextmanager
    def _leaving(self, ticket: Ticket):
        try:
            yield
        finally:
            with self._changed:
                self._states.leave(ticket)
                self._changed.notify_all()

    def _await(self, ready: Callable[[], Found], end: float, *, late: bool = True) -> Found:
        """Wait until ``ready``, called with the lock, is true; released while waiting.

        Raises:
            AdaptersBusyError: It is not by ``end``, and ``late`` is set.
        """
        with self._changed:
            while not (found := ready()) and time.monotonic() < end:
                # Rows release adapters without a notification, so look from time to time.
                self._changed.wait(0.05)
        if late and not found:
            raise AdaptersBusyError(
                f"all {self._limit or ''} adapters that may be mounted are in use: try again, "
                "or raise --optiq-max-adapters"
            )
        return found

    def _in_use(self, adapter: MountedAdapter) -> bool:
        return self._mounts is not None and self._mounts.uses(adapter) > 0

    def _acquire(self, end: float, name: str) -> MountedAdapter:
        while True:
            with self._changed:
                ticket = self._states.request(name)
            with self._leaving(ticket), suppress(AdapterConflictError):
                held = self._await(partial(self._turn, ticket), end)
                if held is True:
                    self._bring(ticket, ticket.entry.offer, end, ticket.entry.pin)
                    with self._changed:
                        held = self._used(name)
                if held:
                    return held

    def _turn(self, ticket: Ticket) -> MountedAdapter | bool | None:
        """The adapter that a request waits for, or True where it has to read the files."""
        return self._used(ticket.name) or (self._mounts and self._states.start(ticket))

    def _used(self, name: str) -> MountedAdapter | None:
        copy = self._states.acquire(name)
        return None if copy is None or self._mounts is None else self._use(copy)

    def _use(self, copy: Copy) -> MountedAdapter:
        assert self._mounts is not None
        self._mounts.use(copy.adapter)
        return copy.adapter

    def _begin(self, mounts: Mounts, offer: Offer) -> tuple[MountedAdapter, Pin]:
        fitted, pin = self._reader.read(offer, mounts.fit)
        return mounts.mount(offer.name, fitted), pin

    def _bring(self, ticket: Ticket, offer: Offer, end: float, pin: Pin | None = None) -> Copy:
        """Read a started load's files in this thread, and let the generation thread mount it."""
        mounts = self._mounts
        assert mounts is not None
        fitted, ticket.pin = self._reader.read(
            offer, mounts.fit, pin=pin, seconds=_left(end), apart=True
        )
        self._await(lambda: self._placed(ticket, mounts, fitted), end)
        copy = ticket.copy
        assert copy is not None
        if copy.state is State.LOADING:
            try:
                self.jobs.run(lambda: self._mount(mounts, ticket, fitted), _left(end))
            except TimeoutError as error:
                raise AdaptersBusyError(
                    "the server did not get to mounting the adapter: try again"
                ) from error
        return copy

    def _placed(self, ticket: Ticket, mounts: Mounts, fitted: Fitted) -> bool:
        placed = self._states.place(ticket, fitted.version)
        if placed and ticket.copy is not None and ticket.copy.state is State.MOUNTED:
            mounts.link(ticket.name, ticket.copy.adapter)
        return placed

    def _mount(self, mounts: Mounts, ticket: Ticket, fitted: Fitted) -> None:
        with self._changed:
            if not self._states.take(ticket):
                raise AdaptersBusyError("the load was given up: try again")
        adapter = None
        try:
            adapter = mounts.place(ticket.name, fitted)
            self._prove(mounts, adapter)
        except BaseException:
            with self._changed:
                self._states.fail(ticket)
                self._changed.notify_all()
            if adapter is not None:
                mounts.discard(adapter)
            raise
        with self._changed:
            self._states.finish(ticket, adapter)
            self._changed.notify_all()
        self._drain()

    def _prove(self, mounts: Mounts, adapter: MountedAdapter) -> None:
        """Test whether rows stay independent, after adapters came to new layers."""
        if not mounts.paths <= self._proven:
            self._proven |= mounts.paths
            self.routable = self.routable and rows_apart(mounts, adapter)

    def _drain(self) -> None:
        """Take off what nobody uses any more; called by the generation thread."""
        mounts = self._mounts
        if mounts is None:
            return
        with self._changed:
            gone = self._states.drained()
            for copy in gone:
                mounts.discard(copy.adapter)
            if gone:
                self._changed.notify_all()


def _left(end: float) -> float:
    """Seconds until a time of the monotonic clock; 0 after it."""
    return max(0.0, end - time.monotonic())
