"""Writes blocks in a thread of its own, with a bound on what waits."""

import atexit
import queue
import threading
from collections.abc import Callable

from .._status import note
from .block_file import Piece

#: Bytes that may wait to be written.
WAITING = 512 << 20


class Writer:
    """Writes pieces one after another; what does not fit is left out.

    Args:
        bound: Bytes that may wait.
    """

    def __init__(self, bound: int = WAITING):
        self._bound = bound
        self._bytes = 0
        self._names: set[str] = set()
        self._changed = threading.Condition()
        self._queue: queue.SimpleQueue[tuple[Piece, Callable[[Piece], None]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def waits(self, key: str) -> bool:
        """Whether a piece waits to be written."""
        return key in self._names

    def offer(self, piece: Piece, write: Callable[[Piece], None]) -> bool:
        """Have a piece written; False if there is no room for it."""
        with self._changed:
            if self._bytes + piece.nbytes > self._bound:
                return False
            self._bytes += piece.nbytes
            self._names.add(piece.key)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()
                atexit.register(self.flush)
        self._queue.put((piece, write))
        return True

    def flush(self, seconds: float = 30) -> bool:
        """Wait until everything is written; False if it takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._names, seconds)

    def _run(self) -> None:
        while True:
            piece, write = self._queue.get()
            try:
                write(piece)
            except Exception as error:  # the thread goes on with the next one
                note("a part of a prompt was not kept", error)
            finally:
                with self._changed:
                    self._bytes -= piece.nbytes
                    self._names.discard(piece.key)
                    self._changed.notify_all()
