"""Adapters that threads load, use, replace and unload at once, beside a thread that generates."""

import contextlib
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlx_optiq_ext.adapters import Catalogue, mounts_on
from mlx_optiq_ext.adapters.catalogue import (
    AdapterConflictError,
    AdaptersBusyError,
    State,
    UnknownAdapterError,
)
from mlx_optiq_ext.errors import InputError

from .generating import OFFERED, generating, mounted, using, version


def test_four_loads_at_once_where_one_may_be_mounted(model, offer):
    catalogue = Catalogue(limit=1, patience=10)
    with ThreadPoolExecutor(4) as pool:
        loading = [pool.submit(catalogue.load, offer(name)) for name in OFFERED]
        time.sleep(0.05)  # all wait for the generation thread, and none occupies the place
        with generating(catalogue, model):
            loaded = [each.result() for each in loading]
            assert [each.name for each in loaded] == [*OFFERED]
            assert len(mounted(catalogue)) == 1
            # Requests for evicted adapters come at once too.
            found = list(pool.map(lambda name: version(catalogue, name), OFFERED * 2))
    assert found == [each.version for each in loaded] * 2
    mounts = mounts_on(model)
    assert mounts is not None
    assert set(mounts.names) == mounted(catalogue)


@pytest.mark.parametrize("replace", [False, True])
def test_a_load_that_fails_evicts_nobody_and_leaves_what_was_there(model, offer, replace):
    catalogue = Catalogue([offer("a"), offer("b")], limit=1, patience=5)
    with generating(catalogue, model):
        good = version(catalogue, "a")
        with pytest.raises(InputError, match="damaged or incomplete"):
            catalogue.load(offer("a" if replace else "x", "bad"), replace=replace)
        assert catalogue.states() == {"a": State.MOUNTED, "b": State.ABSENT}
        assert version(catalogue, "a") == good
        assert catalogue.load(offer("x", "c")).name == "x"


def test_a_new_name_is_offered_only_after_its_first_load(model, offer):
    catalogue = Catalogue(patience=5)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(catalogue.load, offer("a"))
        time.sleep(0.05)
        assert catalogue.offers() == []
        with pytest.raises(UnknownAdapterError):
            catalogue.acquire("a")
        with pytest.raises(UnknownAdapterError):
            catalogue.unload("a")
        with generating(catalogue, model):
            assert loading.result().name == "a"
            assert catalogue.offers() == [offer("a")]


def test_files_are_read_while_the_generation_thread_is_busy(model, offer):
    catalogue = Catalogue([offer("a")], limit=1, patience=0.5)
    with generating(catalogue, model):
        version(catalogue, "a")
    began = time.monotonic()
    with pytest.raises(InputError, match="damaged or incomplete"):
        catalogue.load(offer("x", "bad"))
    assert time.monotonic() - began < 0.4
    with pytest.raises(AdaptersBusyError, match="did not get to mounting"):
        catalogue.load(offer("b"))
    assert mounted(catalogue) == {"a"}
    assert version(catalogue, "a")


def test_whoever_waits_for_a_generation_thread_that_ended_is_told(model, offer):
    catalogue = Catalogue([offer("a")], patience=60)
    with generating(catalogue, model):
        version(catalogue, "a")
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(catalogue.load, offer("b"))
        time.sleep(0.1)
        catalogue.jobs.end(InputError("it has ended"))
        with pytest.raises(InputError, match="it has ended"):
            loading.result(5)
    with pytest.raises(InputError, match="it has ended"):
        catalogue.load(offer("b"))


def test_an_unload_that_requests_outlast_says_so_and_the_adapter_goes_later(model, offer):
    catalogue = Catalogue([offer("a"), offer("b")], limit=1, patience=1.0)
    with generating(catalogue, model):
        with using(catalogue, "a"):
            with pytest.raises(AdaptersBusyError, match="requests still use it"):
                catalogue.unload("a")
            assert [each.name for each in catalogue.offers()] == ["b"]
            with pytest.raises(AdaptersBusyError, match="are in use"):
                catalogue.acquire("b")
        assert version(catalogue, "b")
    mounts = mounts_on(model)
    assert mounts is not None
    assert [*mounts.names] == ["b"]


def test_a_replaced_adapter_stays_for_those_that_use_it(model, offer):
    catalogue = Catalogue([offer("a")], limit=1, patience=1.0)
    with generating(catalogue, model), using(catalogue, "a") as old:
        new = catalogue.load(offer("a", "b"), replace=True)
        assert version(catalogue, "a") == new.version != old.version
        mounts = mounts_on(model)
        assert mounts is not None
        assert mounts.resolve(old) is old
        # One earlier copy of a name drains at a time.
        with pytest.raises(AdaptersBusyError):
            catalogue.load(offer("a", "c"), replace=True)
        assert version(catalogue, "a") == new.version


def test_unloads_during_loads_that_fail_neither_hang_nor_take_a_later_entry(model, offer):
    catalogue = Catalogue([offer("a")], limit=1, patience=5)
    stop = threading.Event()

    def fail_again_and_again():
        while not stop.is_set():
            with contextlib.suppress(AdapterConflictError), pytest.raises(InputError):
                catalogue.load(offer("a", "bad"), replace=True)

    with generating(catalogue, model), ThreadPoolExecutor(2) as pool:
        failing = [pool.submit(fail_again_and_again) for _ in range(2)]
        for _ in range(20):
            with contextlib.suppress(UnknownAdapterError):
                catalogue.unload("a")
            while "a" not in mounted(catalogue):
                with contextlib.suppress(AdapterConflictError):
                    catalogue.load(offer("a"), replace=True)
            assert version(catalogue, "a")
        stop.set()
        for each in failing:
            each.result(10)
        assert mounted(catalogue) == {"a"}


def test_a_storm_of_everything_ends_with_every_answer_right(model, offer):
    catalogue = Catalogue([offer(name) for name in OFFERED], limit=2, patience=20)
    with generating(catalogue, model):
        versions = {name: version(catalogue, name) for name in OFFERED}
    end = time.monotonic() + 3
    expected = (AdapterConflictError, UnknownAdapterError)

    def request(seed):
        chance, served = random.Random(seed), 0
        while time.monotonic() < end:
            name = chance.choice(OFFERED)
            with contextlib.suppress(UnknownAdapterError), using(catalogue, name) as adapter:
                assert adapter.version == versions[name]
                time.sleep(chance.random() / 100)
                served += 1
        return served

    def administer(seed):
        chance = random.Random(seed)
        while time.monotonic() < end:
            name = chance.choice(OFFERED)
            with contextlib.suppress(*expected):
                if chance.random() < 0.3:
                    catalogue.unload(name)
                elif chance.random() < 0.3:
                    with contextlib.suppress(InputError):
                        catalogue.load(offer(name, "bad"), replace=True)
                else:
                    catalogue.load(offer(name), replace=chance.random() < 0.5)

    before = set(threading.enumerate())
    with generating(catalogue, model), ThreadPoolExecutor(12) as pool:
        running = [pool.submit(request, seed) for seed in range(8)]
        running += [pool.submit(administer, seed) for seed in range(8, 12)]
        served = [each.result(60) for each in running]
        assert len(mounted(catalogue)) <= 2
    assert all(served[:8])
    assert not set(threading.enumerate()) - before
    mounts = mounts_on(model)
    assert mounts is not None
    assert all(mounts.uses(each) == 0 for each in mounts.names.values())
