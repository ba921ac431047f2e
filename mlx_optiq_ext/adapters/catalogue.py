"""The adapters that a server offers: known by name, mounted when asked for, evicted when idle."""

import itertools
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn

from .. import distributed
from ..errors import OptiqError
from ..lora import read_adapter
from .activation import MountedAdapter
from .jobs import Jobs
from .mounting import Mounts, prepare_model_for_mounted_lora
from .naming import shortened
from .proof import rows_apart


class UnknownAdapterError(OptiqError):
    """No adapter of that name is offered."""


class AdapterConflictError(OptiqError):
    """An adapter of that name is offered, loaded or unloaded already."""


class AdaptersBusyError(OptiqError):
    """All adapters that may be mounted are in use."""


@dataclass(frozen=True)
class Offer:
    """An adapter that a server offers.

    Attributes:
        name: The name by which requests select it.
        source: The folder or Hub repository that the user named.
        folder: The folder with its files.
    """

    name: str
    source: str
    folder: Path


@dataclass(eq=False)
class _Entry:
    offer: Offer
    adapter: MountedAdapter | None = None
    busy: bool = False
    closing: bool = False
    used: int = 0


class Catalogue:
    """Adapters by name, of which at most ``limit`` are mounted at a time.

    Requests call `acquire` and `release` in threads of their own. Adapters are mounted and taken
    off by the thread that generates, through `jobs`.

    Args:
        offers: Adapters that are offered from the start.
        limit: How many adapters are mounted at most; None for all.
        patience: Seconds that a request waits while all that may be mounted are in use.

    Attributes:
        jobs: Work for the generation thread.
        routable: Whether rows of different adapters may share a batch of this model.
    """

    def __init__(
        self, offers: Iterable[Offer] = (), *, limit: int | None = None, patience: float = 60.0
    ):
        self.jobs = Jobs()
        self.routable = True
        self._limit = limit
        self._patience = patience
        self._entries = {offer.name: _Entry(offer) for offer in offers}
        self._mounts: Mounts | None = None
        self._proven: frozenset[str] = frozenset()
        self._clock = itertools.count(1)
        self._changed = threading.Condition()

    def offers(self) -> list[Offer]:
        """The offered adapters, in the order in which they were added."""
        with self._changed:
            return [each.offer for each in self._entries.values() if not each.closing]

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
        with distributed.together():
            for entry in list(self._entries.values())[: self._limit]:
                entry.adapter = mounts.mount(entry.offer.name, read_adapter(entry.offer.folder))
            distributed.gathered(None)  # no rank continues before all have read their files
        mounted = [each.adapter for each in self._entries.values() if each.adapter]
        distributed.agree(**{f"weights of adapter {each.name}": each.version for each in mounted})
        for adapter in mounted:
            self._prove(mounts, adapter)
        self.routable = all(distributed.gathered(self.routable))
        with self._changed:
            self._mounts = mounts
            self._changed.notify_all()

    def acquire(self, name: str) -> MountedAdapter:
        """The adapter for one request, which stays mounted until `release`.

        Raises:
            UnknownAdapterError: The adapter is not offered.
            AdaptersBusyError: All that may be mounted stayed in use.
            InputError: The adapter's files are missing or damaged.
        """
        while True:
            with self._changed:
                entry = self._await(lambda: self._ready(name))
                mounts = self._mounts
                assert mounts is not None
                if entry.adapter is not None:
                    mounts.use(entry.adapter)
                    entry.used = next(self._clock)
                    return entry.adapter
                victim = self._victim(entry)
                entry.busy = True
            self._bring(entry, entry.offer, victim)

    def release(self, adapter: MountedAdapter) -> None:
        """End a request's use of an adapter."""
        assert self._mounts is not None
        self._mounts.done(adapter)

    def counterpart(self, adapter: MountedAdapter | None) -> MountedAdapter | None:
        """This rank's mount of an adapter that a request brought from another rank.

        Raises:
            RankError: It is not mounted here.
        """
        if adapter is None:
            return None
        assert self._mounts is not None
        own = self._mounts.resolve(adapter) or self._mounts.names.get(adapter.name)
        if own is None or own.version != adapter.version:
            number = distributed.rank()
            raise distributed.RankError(f"rank {number} has no such adapter {adapter.name!r}")
        return own

    def load(self, offer: Offer, *, replace: bool = False) -> MountedAdapter:
        """Offer an adapter from now on, and mount it.

        Args:
            offer: The adapter.
            replace: Whether it may replace an adapter of the same name. New requests then get the
                new weights; running ones keep the old weights, and this call waits for them.

        Raises:
            AdapterConflictError: Its name is taken, or just being loaded or unloaded.
            AdaptersBusyError: All that may be mounted stayed in use.
            InputError: Its files are damaged, or for another model.
        """
        with self._changed:
            entry = self._entries.get(offer.name)
            if entry is not None and (entry.busy or entry.closing or not replace):
                state = "being loaded or unloaded" if entry.busy or entry.closing else "loaded"
                raise AdapterConflictError(f"adapter {offer.name!r} is {state} already")
            new = entry is None
            entry = self._entries.setdefault(offer.name, _Entry(offer))
            entry.busy, old = True, entry.adapter
        try:
            with self._changed:
                self._await(lambda: entry if self._mounts and self._room(entry) else None)
                victim = None if old is not None else self._victim(entry)
            mounted = self._bring(entry, offer, victim)
        except BaseException:
            with self._changed:
                entry.busy = False
                if new:
                    del self._entries[offer.name]
                self._changed.notify_all()
            raise
        if old is not None and old is not mounted:
            self._retire(old)
        return mounted

    def unload(self, name: str) -> None:
        """Stop offering an adapter; waits for the requests that use it.

        Raises:
            UnknownAdapterError: The adapter is not offered.
        """
        with self._changed:
            entry = self._entries.get(name)
            if entry is None or entry.closing:
                raise self._unknown(name)
            entry.closing = True
            while entry.busy:
                self._changed.wait()
            adapter = entry.adapter
        if adapter is not None:
            self._retire(adapter)
        with self._changed:
            del self._entries[name]
            self._changed.notify_all()

    def _await(self, ready: Callable[[], _Entry | None]) -> _Entry:
        """Wait until ``ready`` returns something; the lock is released while waiting."""
        end = time.monotonic() + self._patience
        while (entry := ready()) is None:
            if time.monotonic() > end:
                raise AdaptersBusyError(
                    f"all {self._limit or ''} adapters that may be mounted are in use: try again, "
                    "or raise --optiq-max-adapters"
                )
            # Rows release adapters without a notification, so look from time to time.
            self._changed.wait(0.05)
        return entry

    def _ready(self, name: str) -> _Entry | None:
        entry = self._entries.get(name)
        if entry is None or entry.closing:
            raise self._unknown(name)
        if self._mounts is None or entry.busy:
            return None
        return entry if entry.adapter is not None or self._room(entry) else None

    def _room(self, entry: _Entry) -> bool:
        """Whether an adapter may be mounted, if need be after evicting an idle one."""
        return not self._full(entry) or bool(self._idle())

    def _full(self, entry: _Entry) -> bool:
        others = [e for e in self._entries.values() if e is not entry and (e.adapter or e.busy)]
        return self._limit is not None and len(others) >= self._limit

    def _idle(self) -> list[_Entry]:
        mounts = self._mounts
        return [
            each
            for each in self._entries.values()
            if mounts and each.adapter and not each.busy and not each.closing
            if not mounts.uses(each.adapter)
        ]

    def _victim(self, entry: _Entry) -> MountedAdapter | None:
        """The adapter to evict: the least recently used of the idle ones."""
        if not self._full(entry):
            return None
        oldest = min(self._idle(), key=lambda each: each.used)
        victim, oldest.adapter = oldest.adapter, None
        return victim

    def _bring(self, entry: _Entry, offer: Offer, victim: MountedAdapter | None) -> MountedAdapter:
        mounts = self._mounts
        assert mounts is not None
        try:
            adapter = self.jobs.run(lambda: self._mount(mounts, offer, victim))
            with self._changed:
                entry.adapter, entry.offer = adapter, offer
            return adapter
        finally:
            with self._changed:
                entry.busy = False
                self._changed.notify_all()

    def _mount(self, mounts: Mounts, offer: Offer, victim: MountedAdapter | None) -> MountedAdapter:
        if victim is not None:
            mounts.discard(victim)
        adapter = mounts.mount(offer.name, read_adapter(offer.folder))
        self._prove(mounts, adapter)
        return adapter

    def _prove(self, mounts: Mounts, adapter: MountedAdapter) -> None:
        """Test whether rows stay independent, after adapters came to new layers."""
        if not mounts.paths <= self._proven:
            self._proven |= mounts.paths
            self.routable = self.routable and rows_apart(mounts, adapter)

    def _retire(self, adapter: MountedAdapter) -> None:
        """Unmount an adapter after its last use."""
        mounts = self._mounts
        assert mounts is not None
        with mounts.changed:
            mounts.changed.wait_for(lambda: not mounts.uses(adapter))
        self.jobs.run(lambda: mounts.discard(adapter))

    def _unknown(self, name: str) -> UnknownAdapterError:
        known = ", ".join(each.name for each in self.offers()) or "none"
        return UnknownAdapterError(
            f"there is no model or adapter {shortened(name)} (adapters: {known})"
        )
