"""The answers that wait for the generation thread."""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from queue import Queue
from typing import Any

_nothing: Callable[[], None] = lambda: None  # noqa: E731

_at_end: ContextVar[Callable[[], None]] = ContextVar("mlx_optiq_ext_at_end", default=_nothing)


def once(done: Callable[[], None]) -> Callable[[], None]:
    """A function that calls ``done`` the first time it is called, by whichever thread."""
    first = threading.Lock()

    def call() -> None:
        if first.acquire(blocking=False):
            done()

    return call


@contextlib.contextmanager
def at_end(done: Callable[[], None]) -> Iterator[None]:
    """Have ``done`` called when the generation of the requests made in this block ends."""
    outer = _at_end.get()

    def both() -> None:
        done()
        outer()

    token = _at_end.set(both)
    try:
        yield
    finally:
        _at_end.reset(token)


class Answers:
    """The queue of one request's answers, which also says when there will be no more.

    Args:
        queue: Where the request's thread reads.
        done: Called once, by the thread that puts the last answer.
    """

    def __init__(self, queue: Queue, done: Callable[[], None]):
        self._queue = queue
        self._done = done

    def put(self, item: Any) -> None:
        """Pass an answer on; None and exceptions are the last."""
        if item is None or isinstance(item, Exception):
            done, self._done = self._done, _nothing
            done()
        self._queue.put(item)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)


class Waiting:
    """The requests that wait for the generation thread.

    Attributes:
        dead: Whether that thread has died.
    """

    def __init__(self):
        self.dead = False
        self._answers: weakref.WeakSet[Answers] = weakref.WeakSet()
        self._lock = threading.Lock()

    def follow(self, requests: Queue) -> None:
        """Follow the requests that are put into mlx-lm's queue from now on."""
        put = requests.put

        def followed(item: Any, *args: Any, **kwargs: Any) -> None:
            queue, *request = item
            answers = Answers(queue, _at_end.get())
            with self._lock:
                if self.dead:
                    raise _died()
                self._answers.add(answers)
            put((answers, *request), *args, **kwargs)

        requests.put = followed  # pyright: ignore[reportAttributeAccessIssue]

    def end(self) -> None:
        """End all that waits, because the generation thread has died."""
        with self._lock:
            self.dead = True
            waiting = list(self._answers)
        for answers in waiting:
            answers.put(_died())


def _died() -> RuntimeError:
    return RuntimeError("the generation thread died: start the server anew")
