"""``mlx_lm.server`` in several processes: if one fails, all end and say why.

Without this the other processes wait for a dead generation thread, and the HTTP server stays up.
"""

from typing import Any

from mlx_optiq_compat import symbols
from mlx_optiq_ext import distributed

from ...engine import session
from ...engine.patch import Patch, bind, of


def _distributed() -> bool:
    """Whether the running server was given our options and runs in several processes."""
    running = session.current()
    return running is not None and running.command == "server" and distributed.size() > 1


def _generate(wrapped, instance, args, kwargs):
    if not _distributed():
        return wrapped(*args, **kwargs)
    try:
        return wrapped(*args, **kwargs)
    except Exception as error:  # every error ends this thread
        kind = "" if isinstance(error, distributed.RankError) else f"{type(error).__name__}: "
        distributed.leave(f"rank {distributed.rank()} stops serving: {kind}{error}")


class _Answers:
    """The queue of a request's answers.

    A client that disconnects does not stop the request, because the other processes would go on.

    Attributes:
        failure: The error of the request in this process; empty if it did not fail.
    """

    def __init__(self, queue: Any):
        self.failure = ""
        self._queue = queue

    def put(self, item: Any) -> None:
        """Pass an answer on, and keep an error."""
        if isinstance(item, Exception):
            self.failure = f"{type(item).__name__}: {item}"
        elif hasattr(item, "_should_stop"):
            item.stop = lambda: None
        self._queue.put(item)


def _serve_single(wrapped, instance, args, kwargs):
    if not _distributed():
        return wrapped(*args, **kwargs)
    import mlx.core as mx

    call = bind(wrapped, args, kwargs)
    queue, *request = call["request"]
    answers = _Answers(queue)
    wrapped(**{**call, "request": (answers, *request)})
    # Stock answers with the error and goes on, while the other processes wait for this one.
    own = answers.failure or "the other processes did not finish a request"
    try:
        with distributed.within(
            distributed.LIMIT, lambda: f"rank {distributed.rank()} stops serving: {own}"
        ):
            # mlx-lm computes one token ahead. Evaluating a zero on its stream waits for that token;
            # synchronize would keep Python's other threads from running before 0.32.
            mx.eval(mx.zeros((), stream=symbols.generation_stream(call)))
            failures = distributed.gathered(answers.failure)
    except distributed.RankError as error:
        raise distributed.RankError(answers.failure or str(error)) from error
    if any(failures) and not all(failures):
        raise distributed.Failed(failures)


def _next_request(wrapped, instance, args, kwargs):
    # Without a timeout a batch runs: another process may be busy for as long as a step takes.
    if not _distributed() or bind(wrapped, args, kwargs).get("timeout") is None:
        return wrapped(*args, **kwargs)
    late = f"rank {distributed.rank()} heard nothing from the others for {distributed.LIMIT:.0f} s"
    with distributed.within(distributed.LIMIT, lambda: late):
        return wrapped(*args, **kwargs)


_UPSTREAM = "none: the other processes wait for ever (server.py)"

PATCHES = (
    Patch(
        "mlx_lm.server:ResponseGenerator._generate",
        feature="sharded",
        why="ends all processes when one cannot go on",
        upstream=_UPSTREAM,
        wrapper=_generate,
    ),
    Patch(
        "mlx_lm.server:ResponseGenerator._serve_single",
        feature="sharded",
        why="ends all processes when one fails at a request, and none when a client leaves",
        upstream=_UPSTREAM,
        wrapper=_serve_single,
        uses=(
            *of("mlx_lm.generate", "generation_stream"),
            *of("mlx_lm.server", "GenerationContext._should_stop", "GenerationContext.stop"),
        ),
    ),
    Patch(
        "mlx_lm.server:ResponseGenerator._next_request",
        feature="sharded",
        why="ends an idle process when the others are gone",
        upstream=_UPSTREAM,
        wrapper=_next_request,
    ),
)
