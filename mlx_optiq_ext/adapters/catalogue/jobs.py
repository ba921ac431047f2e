"""Work for the generation thread: MLX arrays belong to the thread that made them."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import Queue
from typing import Any, TypeVar

Result = TypeVar("Result")


class Jobs:
    """Functions that other threads hand to the generation thread.

    Args:
        always: Called by the generation thread after the waiting functions; it must be quick.
    """

    def __init__(self, always: Callable[[], object] = lambda: None):
        self._always = always
        self._waiting: deque[tuple[Callable[[], Any], Future]] = deque()
        self._failure: Exception | None = None

    def run(self, function: Callable[[], Result], seconds: float | None = None) -> Result:
        """Let the generation thread run a function; returns or raises what it does.

        Args:
            function: What to run.
            seconds: How long to wait; None for as long as it takes.

        Raises:
            TimeoutError: It has not run by then. It does not start any more, but may have started.
        """
        done: Future[Result] = Future()
        self._waiting.append((function, done))
        if self._failure is not None:
            self.end(self._failure)
        try:
            return done.result(seconds)
        except TimeoutError:
            done.cancel()
            raise

    def work(self) -> None:
        """Run the waiting functions; called by the generation thread between two steps."""
        while self._waiting:
            function, done = self._waiting.popleft()
            if not done.set_running_or_notify_cancel():
                continue
            try:
                done.set_result(function())
            except BaseException as error:  # raised in the waiting thread instead
                done.set_exception(error)
        self._always()

    def end(self, failure: Exception) -> None:
        """The generation thread has ended: raise an error where functions wait, now and later."""
        self._failure = failure
        while self._waiting:
            try:
                _, done = self._waiting.popleft()
            except IndexError:  # another thread was faster
                return
            if done.set_running_or_notify_cancel():
                done.set_exception(failure)


class RequestQueue(Queue):
    """mlx-lm's queue of requests; its reader runs the waiting jobs before each request."""

    def __init__(self, jobs: Jobs):
        super().__init__()
        self._jobs = jobs

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Run the waiting jobs, then wait for a request as ``Queue.get`` does."""
        self._jobs.work()
        return super().get(block, timeout)
