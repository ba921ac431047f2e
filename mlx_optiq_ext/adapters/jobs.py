"""Work for the thread that generates: arrays belong to the thread that made them."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import Queue
from typing import Any, TypeVar

Result = TypeVar("Result")


class Jobs:
    """Functions that other threads want run by the thread that generates."""

    def __init__(self):
        self._waiting: deque[tuple[Callable[[], Any], Future]] = deque()

    def run(self, function: Callable[[], Result]) -> Result:
        """Have a function run, and wait for what it returns or raises."""
        done: Future[Result] = Future()
        self._waiting.append((function, done))
        return done.result()

    def work(self) -> None:
        """Run what is waiting; for the thread that generates, between two steps."""
        while self._waiting:
            function, done = self._waiting.popleft()
            try:
                done.set_result(function())
            except BaseException as error:  # it belongs to the thread that waits
                done.set_exception(error)


class RequestQueue(Queue):
    """mlx-lm's queue of requests, whose reader works on jobs before each request."""

    def __init__(self, jobs: Jobs):
        super().__init__()
        self._jobs = jobs

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Work on what is waiting, then wait for a request as ``Queue.get`` does."""
        self._jobs.work()
        return super().get(block, timeout)
