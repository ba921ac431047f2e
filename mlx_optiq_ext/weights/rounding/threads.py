"""Threads for what numpy computes while weights are rounded.

Rounding takes many small products. BLAS shares out each of them over its threads, which costs more
than it saves, and many times more where other processes use the cores. So each product runs on one
thread, and independent pieces of work run side by side.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

T = TypeVar("T")
S = TypeVar("S")

#: Most threads; beyond that the interpreter is what they wait for.
MOST = 16


@contextmanager
def single() -> Iterator[None]:
    """Inside, BLAS computes each product on one thread."""
    count()  # before BLAS says one
    with _controller().limit(limits=1, user_api="blas"):
        yield


def each(function: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """A function of each item, on several threads where there are several items.

    The function must not call this again: it would wait for the thread that it runs on.
    """
    if len(items) < 2 or count() < 2:
        return [function(item) for item in items]
    return list(_pool("each").map(function, items))


def begun(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """A function of some arguments, on a thread of its own; it may use `each`."""
    return _pool("begun").submit(function, *arguments)


@cache
def _pool(name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count(), f"optiq-{name}")


@cache
def count() -> int:
    """As many as BLAS may use, which ``OPENBLAS_NUM_THREADS`` and its like decide."""
    found: list[dict[str, Any]] = _controller().select(user_api="blas").info()
    return min(MOST, os.cpu_count() or 1, *(library["num_threads"] for library in found))


@cache
def _controller() -> ThreadpoolController:
    import numpy.linalg  # noqa: F401  loads BLAS

    return ThreadpoolController()
