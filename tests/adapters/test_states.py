"""Every interleaving of loads, replacements, unloads, evictions and requests."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from mlx_optiq_ext.adapters.catalogue.copies import (
    AdapterConflictError,
    State,
    UnknownAdapterError,
)
from mlx_optiq_ext.adapters.catalogue.states import States

NAMES = ("a", "b", "c", "d")
WEIGHTS = ("v", "w", "x", "y", "z")


class Interleaving(RuleBasedStateMachine):
    """Offers are digests of weights, and what is mounted is an object of its own each time."""

    waiting = Bundle("waiting")  # tickets that have not been started or placed
    placed = Bundle("placed")  # tickets whose copy the generation thread is to mount
    mounting = Bundle("mounting")  # tickets that it has taken
    held = Bundle("held")  # adapters that requests use

    @initialize(limit=st.sampled_from([1, 2, 3, None]), offered=st.integers(0, 4))
    def begin(self, limit, offered):
        self.limit = limit
        self.uses = Counter()
        self.states = States(
            zip(NAMES[:offered], WEIGHTS, strict=False), limit, lambda each: self.uses[each] > 0
        )
        self.model = {}  # adapter on the model -> digest
        self.live = set()
        self.mounts = set()

    @rule(target=waiting, name=st.sampled_from(NAMES))
    def request(self, name):
        try:
            ticket = self.states.request(name)
        except UnknownAdapterError:
            assert name not in self.states.offered()
            return multiple()
        self.live.add(ticket)
        return ticket

    @rule(
        target=waiting,
        name=st.sampled_from(NAMES),
        weights=st.sampled_from(WEIGHTS),
        replace=st.booleans(),
    )
    def load(self, name, weights, replace):
        before = self.states.offered()
        try:
            ticket = self.states.load(name, weights, replace=replace)
        except AdapterConflictError:
            assert self.states.offered() == before
            return multiple()
        self.live.add(ticket)
        # What was offered stays so until the new weights are mounted.
        assert self.states.offered() == before
        return ticket

    @rule(target=held, name=st.sampled_from(NAMES))
    def acquire(self, name):
        return self._acquire(name)

    def _acquire(self, name):
        try:
            copy = self.states.acquire(name)
        except UnknownAdapterError:
            return multiple()
        if copy is None:
            assert self.states.state(name) is not State.MOUNTED
            return multiple()
        assert self.model[copy.adapter] == self.states.offered()[name]
        self.uses[copy.adapter] += 1
        return copy.adapter

    @rule(adapter=consumes(held))
    def release(self, adapter):
        self.uses[adapter] -= 1

    @rule(target=placed, ticket=waiting)
    def read(self, ticket):
        return ticket if self._place(ticket) else multiple()

    def _place(self, ticket):
        """Whether the ticket now waits for the generation thread."""
        if ticket not in self.live or ticket.copy is not None:
            return False
        try:
            if not self.states.start(ticket):
                return False
            weights = ticket.offer or ticket.entry.offer
            if not self.states.place(ticket, weights):
                return False
        except AdapterConflictError:
            self._leave(ticket)
            return False
        assert ticket.copy is not None
        assert ticket.copy.digest == weights
        if ticket.copy.state is State.MOUNTED:  # shared
            assert self.states.offered()[ticket.name] == weights
            self._leave(ticket)
            return False
        return True

    @rule(ticket=waiting)
    def give_up(self, ticket):
        """Its files are damaged, or it waited too long: others notice nothing."""
        before = self._mounted()
        held = ticket.victim
        self._leave(ticket)
        after = self._mounted()
        assert all(after[copy] >= names for copy, names in before.items())
        if held is None:
            assert after == before

    @rule(target=mounting, ticket=placed)
    def take(self, ticket):
        if ticket.taken:
            return multiple()
        taken = self.states.take(ticket)
        assert taken is (ticket in self.live)
        self.mounts |= {ticket} if taken else set()
        return ticket if taken else multiple()

    @rule(ticket=consumes(mounting))
    def finish(self, ticket):
        self._finish(ticket)

    def _finish(self, ticket):
        self.mounts.discard(ticket)
        adapter = object()
        self.model[adapter] = ticket.copy.digest
        self.states.finish(ticket, adapter)

    @rule(ticket=consumes(mounting))
    def fail(self, ticket):
        before = self._mounted()
        victim = ticket.victim
        self.mounts.discard(ticket)
        names = self._names(victim)
        self.states.fail(ticket)
        self.live.discard(ticket)
        after = self._mounted()
        assert all(after[copy] >= kept for copy, kept in before.items())
        if victim is not None and names:
            assert after[victim] == names

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name):
        try:
            copy = self.states.unload(name)
        except UnknownAdapterError:
            return
        assert name not in self.states.offered()
        assert copy is None or copy.state is State.DRAINING

    @rule()
    def drain(self):
        for copy in self.states.drained():
            assert not self.uses[copy.adapter]
            del self.model[copy.adapter]

    def _leave(self, ticket):
        self.states.leave(ticket)
        self.live.discard(ticket)

    def _names(self, copy):
        return set() if copy is None else set(self.states.names(copy))

    def _mounted(self):
        return {c: self._names(c) for c in self.states.copies if c.state is State.MOUNTED}

    @invariant()
    def no_more_are_loading_or_mounted_than_may_be(self):
        if self.limit is not None:
            both = [c for c in self.states.copies if c.state in (State.LOADING, State.MOUNTED)]
            assert len(both) <= self.limit

    @invariant()
    def what_is_used_stays_on_the_model(self):
        assert {adapter for adapter, uses in self.uses.items() if uses} <= self.model.keys()

    @invariant()
    def a_mounted_copy_has_a_name_and_no_twin(self):
        mounted = [c for c in self.states.copies if c.state is State.MOUNTED]
        assert all(self._names(copy) for copy in mounted)
        assert len({copy.digest for copy in mounted}) == len(mounted)

    def teardown(self):
        """Every waiter ends once requests end and the generation thread works."""
        if not hasattr(self, "states"):
            return
        self.uses.clear()
        for ticket in list(self.mounts):
            self._finish(ticket)
        for _ in range(4 * len(self.live) + 4):
            for ticket in sorted(self.live, key=lambda each: each.number):
                self.drain()
                if ticket.offer is None and self._served(ticket):
                    continue
                if ticket.copy is None:
                    self._place(ticket)
                elif ticket.copy.state is State.LOADING:
                    assert ticket.taken or self.states.take(ticket)
                    self._finish(ticket)
                if ticket in self.live and ticket.copy is not None:
                    if ticket.copy.state is State.LOADING:
                        continue
                    self._leave(ticket)
        assert self.live == set()
        self.drain()
        assert {c.state for c in self.states.copies} <= {State.MOUNTED}
        assert {c.adapter for c in self.states.copies} == set(self.model)

    def _served(self, ticket):
        """Whether a waiting request found its adapter mounted or gone."""
        if ticket.copy is not None:
            return False
        try:
            if self.states.acquire(ticket.name) is None:
                return False
        except UnknownAdapterError:
            pass
        self._leave(ticket)
        return True


TestInterleaving = pytest.mark.newest(Interleaving.TestCase)
TestInterleaving.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
