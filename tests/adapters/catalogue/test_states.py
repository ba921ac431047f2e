"""Every interleaving of loads, replacements, unloads, evictions and requests."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlx_optiq_ext.adapters.catalogue.copies import (
    AdapterConflictError,
    State,
    UnknownAdapterError,
)
from mlx_optiq_ext.adapters.catalogue.states import States

NAMES, WEIGHTS = ("a", "b", "c"), ("v", "w", "x", "y")
names, weights = st.sampled_from(NAMES), st.sampled_from(WEIGHTS)
#: Which of several, counted from the newest.
which = st.integers(0, 3)


class Interleaving(RuleBasedStateMachine):
    """Offers are digests of weights, and what is mounted is an object of its own each time."""

    @initialize(
        limit=st.sampled_from([1, 2, 2, None]), offered=st.integers(1, 3), mounted=st.integers(0, 3)
    )
    def begin(self, limit, offered, mounted):
        self.limit = limit
        self.uses = Counter()
        self.states = States(
            zip(NAMES[:offered], WEIGHTS, strict=False), limit, lambda each: self.uses[each] > 0
        )
        self.model = {}  # adapter on the model -> digest
        self.live = []  # loads that their callers have not left
        self.waiting = []  # those of them that are not placed
        self.placed = []  # loads that the generation thread is to take, also left ones
        self.taken = []
        self.held = []  # adapters that requests use
        for name in NAMES[:mounted]:
            self.served(name, True)

    @rule(name=names, ends=st.booleans())
    def served(self, name, ends):
        """A request from its beginning to its end, or to the middle of its answer."""
        before = len(self.held)
        self.request(name)
        if self.waiting:
            self.read(0)
        while self.placed:
            self.take()
        while self.taken:
            self.finish()
        if ends and len(self.held) > before:
            self.release(0)

    @rule(name=names)
    def request(self, name):
        if name not in self.states.offered():
            with pytest.raises(UnknownAdapterError):
                self.states.request(name)
        elif self.states.state(name) is not State.MOUNTED:
            self._begun(self.states.request(name))

    @rule(name=names, weights=weights, replace=st.sampled_from([True, True, False]))
    def load(self, name, weights, replace):
        before = self.states.offered()
        try:
            self._begun(self.states.load(name, weights, replace=replace))
        except AdapterConflictError:
            assert name in before or any(each.name == name for each in self.live + self.taken)
        # What was offered stays so until the new weights are mounted.
        assert self.states.offered() == before

    def _begun(self, ticket):
        self.live.append(ticket)
        self.waiting.append(ticket)

    @rule(name=names)
    def acquire(self, name):
        adapter = self._acquire(name)
        if adapter is not None:
            self.held.append(adapter)

    def _acquire(self, name):
        if name not in self.states.offered():
            return None
        copy = self.states.acquire(name)
        assert (copy is not None) is (self.states.state(name) is State.MOUNTED)
        if copy is None:
            return None
        assert self.model[copy.adapter] == self.states.offered()[name]
        self.uses[copy.adapter] += 1
        return copy.adapter

    @precondition(lambda self: self.held)
    @rule(which=which)
    def release(self, which):
        self.uses[self.held.pop(-1 - which % len(self.held))] -= 1

    @precondition(lambda self: self.waiting)
    @rule(which=which)
    def read(self, which):
        self._read(self.waiting[-1 - which % len(self.waiting)])

    def _read(self, ticket):
        """Start and place a load if there is room, as its caller does."""
        try:
            placed = self.states.start(ticket) and self.states.place(
                ticket, ticket.offer or ticket.entry.offer
            )
        except AdapterConflictError:
            self._leave(ticket)
            return
        if placed:
            self.waiting.remove(ticket)
            victim = ticket.victim
            if victim is not None and self.uses[victim.adapter]:
                # Only a name's own weights make room while they are in use.
                assert self.states.names(victim) == [ticket.name]
            if ticket.copy.state is State.MOUNTED:  # shared
                assert self.states.offered()[ticket.name] == ticket.copy.digest
                self._leave(ticket)
            else:
                self.placed.append(ticket)

    @precondition(lambda self: self.live)
    @rule(which=which, really=st.sampled_from([False, False, True]))
    def give_up(self, which, really):
        """Its files are damaged, or it waited too long: nobody loses anything."""
        if not really:
            return
        with self._nobody_loses():
            self._leave(self.live[-1 - which % len(self.live)])

    @precondition(lambda self: self.placed)
    @rule()
    def take(self):
        ticket = self.placed.pop(0)
        taken = self.states.take(ticket)
        assert taken is (ticket in self.live)
        if taken:
            self.taken.append(ticket)

    @precondition(lambda self: self.taken)
    @rule()
    def finish(self):
        ticket, adapter = self.taken.pop(0), object()
        self.model[adapter] = ticket.copy.digest
        self.states.finish(ticket, adapter)
        if ticket in self.live:
            # Its caller gets what it waited for, unless the name was unloaded.
            if ticket.entry.copy is ticket.copy and ticket.name in self.states.offered():
                self.acquire(ticket.name)
            self._leave(ticket)

    @precondition(lambda self: self.taken)
    @rule()
    def fail(self):
        ticket = self.taken.pop(0)
        victim = ticket.victim
        names = set() if victim is None else set(self.states.names(victim))
        with self._nobody_loses():
            self.states.fail(ticket)
        if victim is not None and names:
            assert victim.state is State.MOUNTED
            assert set(self.states.names(victim)) == names
        if ticket in self.live:
            self._leave(ticket)

    @rule(name=names, really=st.sampled_from([False, False, True]))
    def unload(self, name, really):
        if not really:
            return
        if name in self.states.offered():
            copy = self.states.unload(name)
            assert copy is None or copy.state is State.DRAINING
        assert name not in self.states.offered()

    @rule()
    def drain(self):
        for copy in self.states.drained():
            assert not self.uses[copy.adapter]
            del self.model[copy.adapter]

    def _leave(self, ticket):
        self.states.leave(ticket)
        self.live.remove(ticket)
        if ticket in self.waiting:
            self.waiting.remove(ticket)

    def _nobody_loses(self):
        return Unchanged(self.states)

    @invariant()
    def no_more_are_loading_or_mounted_than_may_be(self):
        both = [c for c in self.states.copies if c.state in (State.LOADING, State.MOUNTED)]
        assert self.limit is None or len(both) <= self.limit

    @invariant()
    def no_more_are_read_than_may_be_mounted(self):
        mounted = State.MOUNTED
        new = [t for t in self.waiting if t.started and self.states.state(t.name) is not mounted]
        assert self.limit is None or len(new) <= self.limit

    @invariant()
    def what_is_used_stays_on_the_model(self):
        assert {adapter for adapter, uses in self.uses.items() if uses} <= self.model.keys()

    @invariant()
    def a_mounted_copy_has_a_name_and_no_twin(self):
        mounted = [c for c in self.states.copies if c.state is State.MOUNTED]
        assert all(self.states.names(copy) for copy in mounted)
        assert len({copy.digest for copy in mounted}) == len(mounted)
        named = [n for n in self.states.offered() if self.states.state(n) is State.MOUNTED]
        assert sum(len(self.states.names(copy)) for copy in mounted) == len(named)

    def still_used(self):
        """What is used although all requests have ended."""
        return ()

    def teardown(self):
        """Every waiter ends once requests end and the generation thread works."""
        if not hasattr(self, "states"):
            return
        self.held.clear()
        for _ in range(3 * len(self.live) + 12):
            self.uses = Counter(self.still_used())
            self.drain()
            while self.placed:
                self.take()
            while self.taken:
                self.finish()
            for ticket in list(self.waiting):
                served = self.states.state(ticket.name) is State.MOUNTED
                gone = ticket.name not in self.states.offered()
                if ticket.offer is None and (served or gone):
                    self._leave(ticket)
                else:
                    self._read(ticket)
        assert self.live == []
        self.held.clear()
        self.uses.clear()
        self.drain()
        assert {copy.state for copy in self.states.copies} <= {State.MOUNTED}
        assert {copy.adapter for copy in self.states.copies} == set(self.model)


class Unchanged:
    """What was mounted stays mounted, under all of its names."""

    def __init__(self, states):
        self.states = states

    def mounted(self):
        copies = [c for c in self.states.copies if c.state is State.MOUNTED]
        return {copy: set(self.states.names(copy)) for copy in copies}

    def __enter__(self):
        self.before = self.mounted()

    def __exit__(self, *_):
        after = self.mounted()
        assert all(after.get(copy) == names for copy, names in self.before.items())


TestInterleaving = pytest.mark.newest(Interleaving.TestCase)
TestInterleaving.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)


def test_the_oldest_load_goes_first():
    uses = Counter()
    states = States(zip("abc", "vwx", strict=True), 1, lambda each: uses[each] > 0)
    states.attach({"a": ("v", "A", None)})
    uses["A"] = 1
    first, second = states.request("b"), states.request("c")
    assert not states.start(first)
    uses["A"] = 0
    assert not states.start(second)
    assert states.start(first)
    assert not states.start(second)  # the first one takes the only place
    states.leave(first)
    assert states.start(second)
