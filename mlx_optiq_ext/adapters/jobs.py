"""Work for the generation thread: MLX arrays belong to the thread that made them."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import Queue
from typing import Any, TypeVar

Result = TypeVar("Result")


class Jobs:
    """Functions that other threads hand to the generation thread."""

    def __init__(self):
        self._waiting: deque[tuple[Callable[[], Any], Future]] = deque()

    def run(self, function: Callable[[], Result]) -> Result:
        """Let the generation thread run a function; returns or raises what it does."""
        done: Future[Result] = Future()
        self._waiting.append((function, done))
        return done.result()

    def work(self) -> None:
        """Run the waiting functions; called by the generation thread between two steps."""
        while self._waiting:
            function, done = self._waiting.popleft()
            try:
                done.set_result(function())
            except BaseException as error:  # raised in the waiting thread instead
                done.set_exception(error)


class RequestQueue(Queue):
    """mlx-lm's queue of requests; its reader runs the waiting jobs before each request."""

    def __init__(self, jobs: Jobs):
        super().__init__()
        self._jobs = jobs

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Run the waiting jobs, then wait for a request as ``Queue.get`` does."""
        self._jobs.work()
        return super().get(block, timeout)
