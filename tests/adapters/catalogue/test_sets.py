"""Several adapters for one request: all of them or none, in every interleaving."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from mlx_optiq_ext.adapters import Catalogue, Offer
from mlx_optiq_ext.adapters.catalogue import AdaptersBusyError, State, UnknownAdapterError
from mlx_optiq_ext.errors import InputError

from .generating import OFFERED, generating, mounted, uses, using, version
from .test_states import Interleaving, names


class Collecting(Interleaving):
    """One request at a time collects a set, beside all else that may happen.

    Attributes:
        wanted: The names that it still lacks.
        collected: The adapters that it holds meanwhile.
    """

    def __init__(self):
        super().__init__()
        self.wanted, self.collected = [], []

    @precondition(lambda self: not self.wanted)
    @rule(wanted=st.lists(names, min_size=2, max_size=3, unique=True))
    def acquire_set(self, wanted):
        """All adapters of a set at once, or begin to collect them one after another."""
        offered = self.states.offered()
        if not offered.keys() >= set(wanted):
            with pytest.raises(UnknownAdapterError):
                self.states.acquire_all(wanted)
            return
        ready = all(self.states.state(name) is State.MOUNTED for name in wanted)
        copies = self.states.acquire_all(wanted)
        assert (copies is not None) is ready
        if copies is not None:
            assert [self.model[each.adapter] for each in copies] == [offered[n] for n in wanted]
            for each in copies:
                self.uses[each.adapter] += 1
                self.held += [each.adapter]
        elif self.limit is None or len(wanted) <= self.limit:
            self.wanted = wanted

    @precondition(lambda self: self.wanted)
    @rule()
    def collect(self):
        """The set's next adapter: acquired, waited for, or unknown by now."""
        name = self.wanted[0]
        if name not in self.states.offered():
            self.give_back()
        elif (adapter := self._acquire(name)) is not None:
            self.collected.append(adapter)
            self.wanted = self.wanted[1:]
            if not self.wanted:
                self.held += self.collected
                self.collected = []
        elif not any(each.name == name and each.offer is None for each in self.live):
            self._begun(self.states.request(name))

    @precondition(lambda self: self.wanted)
    @rule(really=st.sampled_from([False, False, True]))
    def stop_collecting(self, really):
        """One of its loads failed, or it waited too long."""
        if really:
            self.give_back()

    def give_back(self):
        for adapter in self.collected:
            self.uses[adapter] -= 1
        self.wanted, self.collected = [], []

    def still_used(self):
        """A request that collects keeps what it holds while it waits for the rest."""
        if self.wanted:
            self.collect()
        return self.collected

    def teardown(self):
        """It gets all of its set once other requests end."""
        super().teardown()
        assert self.wanted == self.collected == []


TestCollecting = pytest.mark.newest(Collecting.TestCase)
TestCollecting.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


def test_adapters_of_a_set_are_used_together_and_given_back_together(model, offer):
    catalogue = Catalogue([offer(name) for name in OFFERED], limit=2, patience=10)
    with generating(catalogue, model):
        for names in (["a", "b"], ["c", "d"], ["d", "a"]):
            held = catalogue.acquire_all(names)
            assert [each.name for each in held] == names
            assert mounted(catalogue) == set(names)
            catalogue.release(*held)
        assert uses(model) == 0


def test_a_set_that_cannot_be_mounted_together_is_refused_at_once(model, offer):
    catalogue = Catalogue([offer("a"), offer("b")], limit=1, patience=60)
    with generating(catalogue, model):
        version(catalogue, "a")
        with pytest.raises(InputError, match="names 2 adapters, and at most 1 may be mounted"):
            catalogue.acquire_all(["a", "b"])
        assert mounted(catalogue) == {"a"}


def test_a_set_with_a_part_that_fails_holds_nothing(model, offer, folders, tmp_path):
    lost = shutil.copytree(folders["c"], tmp_path / "lost")
    known = [offer("a"), offer("b"), Offer("lost", "lost", lost)]
    catalogue = Catalogue(known, limit=2, patience=5)
    shutil.rmtree(lost)
    with generating(catalogue, model):
        for names in (["a", "lost"], ["lost", "a"]):
            with pytest.raises(InputError, match="its folder is gone"):
                catalogue.acquire_all(names)
        for names in (["a", "nobody"], ["nobody", "a"]):
            with pytest.raises(UnknownAdapterError):
                catalogue.acquire_all(names)
        assert uses(model) == 0
        assert mounted(catalogue) == {"a", "b"}


def test_sets_that_overlap_and_single_requests_all_end(model, offer):
    catalogue = Catalogue([offer(name) for name in OFFERED], limit=2, patience=30)
    wanted = [["a", "b"], ["c", "d"], ["b", "c"], ["d", "a"], ["a"], ["c"]]

    def ask(names):
        held = catalogue.acquire_all(names)
        time.sleep(0.002)
        assert uses(model) >= len(held)
        catalogue.release(*held)
        return [each.name for each in held]

    with generating(catalogue, model), ThreadPoolExecutor(8) as pool:
        version(catalogue, "a")
        assert list(pool.map(ask, wanted * 4)) == wanted * 4
        assert uses(model) == 0


def test_a_set_waits_no_longer_than_one_adapter(model, offer):
    catalogue = Catalogue([offer(name) for name in OFFERED], limit=2, patience=1.0)
    with generating(catalogue, model), using(catalogue, "a"):
        began = time.monotonic()
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(catalogue.acquire_all, ["b", "c"]) for _ in range(3)]
            for each in waiting:
                with pytest.raises(AdaptersBusyError):
                    each.result()
        assert time.monotonic() - began < 8
        assert uses(model) == 1
