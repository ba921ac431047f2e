"""Ctrl-C in a command with our options: one line and exit status 130, at any moment.

Python raises KeyboardInterrupt only between two of its own instructions, and the exception can get
lost. So a thread listens too: a second Ctrl-C ends the process at once, and so does the first one
if the command does not end in time.
"""

import _thread
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mlx_optiq_ext import _activation, files

STATUS = 128 + signal.SIGINT

#: Seconds in which a command has to end by itself.
GRACE = 3.0

#: The words of `_activation.end`.
NOTHING_DONE = "interrupted: nothing was done yet"


def requested() -> bool:
    """Whether the command line has options of ours, in the process that the user started."""
    if "multiprocessing" in sys.modules:
        from multiprocessing import parent_process

        if parent_process() is not None:
            return False
    return any(word.startswith("--optiq-") for word in sys.argv[1:])


def _watched() -> bool:
    """Whether Python handles Ctrl-C here; a background job ignores it."""
    main = threading.current_thread() is threading.main_thread()
    return main and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@contextmanager
def handled(
    command: str, message: Callable[[], str | None], grace: float = GRACE
) -> Iterator[None]:
    """End a command on Ctrl-C, if it was given options of ours.

    Args:
        command: Name after ``mlx_lm.``.
        message: Gives the text to print, or None to leave Ctrl-C to the command.
        grace: Seconds that it has to end by itself.

    Raises:
        SystemExit: With status 130.
    """
    if signal.getsignal(signal.SIGINT) is _activation.end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    watch = _Watch(command, message, grace) if requested() and _watched() else None
    try:
        yield
    except KeyboardInterrupt:
        text = message()
        if text is None:
            raise
        if watch is None:
            _say(command, text)
        else:
            watch.say()
        files.discard_unfinished()
        threading.Thread(target=_outlast, args=(grace,), daemon=True).start()
        raise SystemExit(STATUS) from None
    finally:
        if watch is not None:
            watch.end()


class _Watch:
    """A thread that notices Ctrl-C even while Python's main thread is busy."""

    def __init__(self, command: str, message: Callable[[], str | None], grace: float):
        self._command, self._message, self._grace = command, message, grace
        self._lock, self._said = threading.Lock(), False
        self._raised_anew = 0
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="optiq-ctrl-c", daemon=True).start()

    def say(self) -> None:
        """Say once that the command was interrupted."""
        with self._lock:
            if not self._said:
                self._said = True
                _say(self._command, self._message() or "interrupted")

    def end(self) -> None:
        """Stop listening."""
        sys.unraisablehook = self._hook
        current = signal.set_wakeup_fd(self._before)
        if current != self._writer.fileno():
            signal.set_wakeup_fd(current)  # set by other code since then
        self._writer.close()

    def _unraisable(self, unraisable: Any) -> None:
        """Raise KeyboardInterrupt again if a destructor swallowed it."""
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._hook(unraisable)
            return
        self._raised_anew += 1
        timer = threading.Timer(0.01, _thread.interrupt_main)
        timer.daemon = True
        timer.start()

    def _listen(self) -> None:
        end: float | None = None
        with self._reader:
            while True:
                left = None if end is None else max(end - time.monotonic(), 0.01)
                self._reader.settimeout(left)
                try:
                    received = self._reader.recv(1)
                except TimeoutError:
                    self._leave()
                    return
                if not received:
                    return
                if received[0] != signal.SIGINT or self._message() is None:
                    continue
                if self._raised_anew:
                    self._raised_anew -= 1
                    continue
                if end is not None:
                    self._leave()
                end = time.monotonic() + self._grace

    def _leave(self) -> None:
        self.say()
        files.discard_unfinished()
        os._exit(STATUS)


def _outlast(grace: float) -> None:
    """End the process if other threads still run after its main thread has ended."""
    threading.main_thread().join()
    time.sleep(grace)
    os._exit(STATUS)


def _say(command: str, message: str) -> None:
    # A progress bar may not have ended its line yet.
    with suppress(OSError, ValueError):  # nobody may read it any more, and the process must end
        start = "\n" if sys.stderr.isatty() else ""
        print(f"{start}mlx_lm.{command}: {message}", file=sys.stderr, flush=True)
