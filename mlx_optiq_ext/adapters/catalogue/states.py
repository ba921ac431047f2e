"""Which adapters are offered, and whose weights are on the model: a state machine without threads.

A name is offered, and may have a copy of weights that other names share::

    ABSENT -place-> LOADING -finish-> MOUNTED -unload, replace, evict-> DRAINING -drained-> ABSENT
              ABSENT <-fail-+             ^------------fail-------------+

Every load has a ticket. Its holder starts, places and leaves it; what changes the model (`take`,
`finish`, `fail`, `drained`) belongs to the thread that generates.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..naming import shortened
from .copies import AdapterConflictError, Copy, Entry, State, Ticket, UnknownAdapterError


class States:
    """The state machine. Not safe for threads: the caller holds a lock.

    Args:
        offers: What each name stands for from the start.
        limit: How many copies are loading or mounted at most; None for any number.
        in_use: Whether requests or rows use an adapter.

    Attributes:
        copies: All copies, in any state but absent.
    """

    def __init__(
        self, offers: Iterable[tuple[str, Any]], limit: int | None, in_use: Callable[[Any], bool]
    ):
        self.copies: list[Copy] = []
        self._entries = {name: Entry(offer) for name, offer in offers}
        self._limit = limit
        self._in_use = in_use
        self._tickets: set[Ticket] = set()
        self._clock = itertools.count(1)

    def offered(self) -> dict[str, Any]:
        """What is offered, by name, in the order of the first loads."""
        return {n: e.offer for n, e in self._entries.items() if e.offer is not None}

    def state(self, name: str) -> State:
        """The state of a name's weights."""
        entry = self._entries.get(name)
        return entry.copy.state if entry is not None and entry.copy else State.ABSENT

    def attach(self, adapters: Mapping[str, tuple[str, Any, Any]]) -> None:
        """Start on a model that has adapters already.

        Args:
            adapters: Digest, adapter and pin of each name.
        """
        for copy in self.copies:
            copy.state, copy.held = State.ABSENT, False
        found: dict[str, Copy] = {}
        for name, entry in self._entries.items():
            entry.copy = None
            if name in adapters:
                digest, adapter, entry.pin = adapters[name]
                fresh = Copy(digest, State.MOUNTED, adapter, next(self._clock))
                entry.copy = found.setdefault(digest, fresh)
        self.copies = list(found.values())

    def names(self, copy: Copy) -> list[str]:
        """The names that share a copy."""
        return [name for name, entry in self._entries.items() if entry.copy is copy]

    def acquire(self, name: str) -> Copy | None:
        """The name's mounted copy; None if it has none now. The caller counts the use.

        Raises:
            UnknownAdapterError: The name is not offered.
        """
        copy = self._offered(name).copy
        if copy is None or copy.state is not State.MOUNTED:
            return None
        copy.used = next(self._clock)
        return copy

    def acquire_all(self, names: Iterable[str]) -> list[Copy] | None:
        """The mounted copies of several names; None unless all have one now. See `acquire`.

        Raises:
            UnknownAdapterError: A name is not offered.
        """
        wanted = list(names)
        copies = [self._offered(name).copy for name in wanted]
        if any(copy is None or copy.state is not State.MOUNTED for copy in copies):
            return None
        return [copy for name in wanted if (copy := self.acquire(name)) is not None]

    def request(self, name: str) -> Ticket:
        """Begin a load for a request; several may wait for one name.

        Raises:
            UnknownAdapterError: The name is not offered.
        """
        return self._ticket(name, self._offered(name), None)

    def load(self, name: str, offer: Any, *, replace: bool) -> Ticket:
        """Begin a load that offers a name, which nobody else loads until it ends.

        Raises:
            AdapterConflictError: The name is being loaded, or offered and ``replace`` is not set.
        """
        entry = self._entries.get(name)
        if entry is not None and (entry.owner is not None or not replace):
            state = "being loaded" if entry.owner is not None else "loaded"
            raise AdapterConflictError(f"adapter {name!r} is {state} already")
        entry = self._entries.setdefault(name, Entry())
        entry.owner = ticket = self._ticket(name, entry, offer)
        return ticket

    def start(self, ticket: Ticket) -> bool:
        """Whether the ticket's files may be read now; the oldest that may go first.

        Raises:
            AdapterConflictError: Its name was unloaded meanwhile.
        """
        self._check(ticket)
        if not ticket.started:
            others = (t for t in self._tickets if not t.started and t.number < ticket.number)
            if not self._ready(ticket) or any(self._ready(each) for each in others):
                return False
            ticket.started, ticket.entry.owner = True, ticket
        return True

    def place(self, ticket: Ticket, digest: str) -> bool:
        """Give a ticket, whose files were read, a copy; False if it has to wait for room.

        It then has a mounted copy of the same weights, or one that `take` and `finish` mount.

        Raises:
            AdapterConflictError: Its name was unloaded meanwhile.
        """
        self._check(ticket)
        own = ticket.entry.copy
        if own is not None and own.state is not State.MOUNTED:
            return False
        twin = next((each for each in self.copies if each.digest == digest), None)
        if twin is not None:
            return self._shared(ticket, twin)
        victim = own if own is not None and self._sole(ticket.entry) else None
        if victim is None and self._full():
            victim = min(filter(self._idle, self.copies), key=lambda c: c.used, default=None)
            if victim is None:
                return False
        ticket.copy = copy = Copy(digest)
        if victim is not None:
            ticket.victim = victim
            victim.state, victim.heir, victim.held = State.DRAINING, copy, True
        self.copies.append(copy)
        return True

    def take(self, ticket: Ticket) -> bool:
        """Whether the generation thread is to mount a ticket's copy: nobody has left it."""
        ticket.taken = ticket in self._tickets and ticket.copy in self.copies
        return ticket.taken

    def finish(self, ticket: Ticket, adapter: Any) -> None:
        """A ticket's copy is on the model."""
        copy, victim = ticket.copy, ticket.victim
        assert copy is not None
        copy.state, copy.adapter = State.MOUNTED, adapter
        if victim is not None:
            victim.held = False
            for name in self.names(victim):
                self._entries[name].copy = None
        self._link(ticket, copy)

    def fail(self, ticket: Ticket) -> None:
        """End a load without effect; the copy whose slot it was to take is mounted again."""
        copy, victim, entry = ticket.copy, ticket.victim, ticket.entry
        if copy is not None and copy.state is State.LOADING:
            copy.state = State.ABSENT
            self.copies.remove(copy)
            if victim is not None:
                victim.state, victim.heir, victim.held = State.MOUNTED, None, False
                self._settle(victim)
        if entry.owner is ticket:
            entry.owner = None
            if entry.offer is None:
                del self._entries[ticket.name]
        self._tickets.discard(ticket)

    def leave(self, ticket: Ticket) -> None:
        """The caller leaves: what the generation thread has not taken fails; may be repeated."""
        if not ticket.taken:
            self.fail(ticket)
        self._tickets.discard(ticket)

    def unload(self, name: str) -> Copy | None:
        """Stop offering a name; a load in progress of it will fail.

        Returns:
            The copy that drains because no other name has it.

        Raises:
            UnknownAdapterError: The name is not offered.
        """
        copy = self._offered(name).copy
        del self._entries[name]
        if copy is None:
            return None
        self._settle(copy)
        return None if self.names(copy) else copy

    def drained(self) -> list[Copy]:
        """Forget the draining copies that nobody uses; the caller takes them off the model."""
        gone = [
            each
            for each in self.copies
            if each.state is State.DRAINING and not each.held and not self._in_use(each.adapter)
        ]
        for each in gone:
            each.state = State.ABSENT
            self.copies.remove(each)
        return gone

    def _offered(self, name: str) -> Entry:
        entry = self._entries.get(name)
        if entry is None or entry.offer is None:
            known = ", ".join(self.offered()) or "none"
            raise UnknownAdapterError(
                f"there is no model or adapter {shortened(name)} (adapters: {known})"
            )
        return entry

    def _ticket(self, name: str, entry: Entry, offer: Any) -> Ticket:
        ticket = Ticket(name, entry, offer, next(self._clock))
        self._tickets.add(ticket)
        return ticket

    def _check(self, ticket: Ticket) -> None:
        if self._entries.get(ticket.name) is not ticket.entry:
            raise AdapterConflictError(f"adapter {ticket.name!r} was unloaded while it was loaded")

    def _ready(self, ticket: Ticket) -> bool:
        """Whether a load may start, but for older ones."""
        entry = ticket.entry
        copy = entry.copy
        if self._entries.get(ticket.name) is not entry or entry.owner not in (None, ticket):
            return False
        if copy is not None:
            # Of a name's weights one earlier copy drains at a time.
            earlier = any(each.heir is copy for each in self.copies)
            if ticket.offer is None or copy.state is not State.MOUNTED or earlier:
                return False
            if self._sole(entry):
                return True
        reading = sum(t.started and t.copy is None for t in self._tickets)
        usable = [each for each in self.copies if self._occupies(each) and not self._idle(each)]
        return self._limit is None or reading + len(usable) < self._limit

    def _occupies(self, copy: Copy) -> bool:
        heir = copy.heir
        return heir is None or heir.state not in (State.LOADING, State.MOUNTED)

    def _full(self) -> bool:
        return self._limit is not None and sum(map(self._occupies, self.copies)) >= self._limit

    def _idle(self, copy: Copy) -> bool:
        awaited = any(ticket.copy is copy for ticket in self._tickets)
        return copy.state is State.MOUNTED and not awaited and not self._in_use(copy.adapter)

    def _sole(self, entry: Entry) -> bool:
        return entry.copy is not None and len(self.names(entry.copy)) == 1

    def _shared(self, ticket: Ticket, twin: Copy) -> bool:
        if twin.state is State.DRAINING and not twin.held:
            if not self._occupies(twin) and self._full():
                return False
            twin.state, twin.heir = State.MOUNTED, None
        if twin.state is not State.MOUNTED:
            return False
        self._link(ticket, twin)
        return True

    def _link(self, ticket: Ticket, copy: Copy) -> None:
        entry, ticket.copy = ticket.entry, copy
        old, entry.copy, entry.owner = entry.copy, copy, None
        entry.offer = entry.offer if ticket.offer is None else ticket.offer
        entry.pin = ticket.pin
        copy.used = next(self._clock)
        for each in (old, copy):
            if each is not None:
                self._settle(each)

    def _settle(self, copy: Copy) -> None:
        """A mounted copy without a name drains."""
        if copy.state is State.MOUNTED and not self.names(copy):
            copy.state = State.DRAINING
