"""A catalogue of adapters, beside a thread that does what the one that generates does."""

import contextlib
import threading

from mlx_optiq_ext.adapters import mounts_on
from mlx_optiq_ext.adapters.catalogue import State

#: Names of adapters that catalogues offer.
OFFERED = ("a", "b", "c", "d")


@contextlib.contextmanager
def generating(catalogue, model):
    """A thread that does what the one that generates does between two steps."""
    stop = threading.Event()

    def generate():
        catalogue.attach(model)
        while not stop.wait(0.002):
            catalogue.jobs.work()

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def using(catalogue, name):
    adapter = catalogue.acquire(name)
    try:
        yield adapter
    finally:
        catalogue.release(adapter)


def version(catalogue, name):
    with using(catalogue, name) as adapter:
        return adapter.version


def mounted(catalogue):
    return {name for name, state in catalogue.states().items() if state is State.MOUNTED}


def uses(model) -> int:
    mounts = mounts_on(model)
    assert mounts is not None
    return sum(mounts.uses(each) for each in mounts.names.values())
