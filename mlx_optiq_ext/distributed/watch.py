"""Ends this process when the other processes cannot be waited for any longer.

A collective that waits inside MLX cannot be interrupted from Python, so the process prints the
reason and exits. ``mlx.launch`` then ends the others.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

#: Seconds that the other processes have to answer when they should answer at once.
LIMIT = 25.0


@contextmanager
def within(seconds: float, message: Callable[[], str]) -> Iterator[None]:
    """Print a message and end this process if the block takes longer than some seconds."""
    timer = threading.Timer(seconds, lambda: leave(message()))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


#: Waits for the end of its input, which comes when its parent ends at the latest.
GUARD = """
import os, select, signal, sys, time
seconds, message, parent = sys.argv[1:]
if not select.select([0], [], [], float(seconds))[0]:
    try:
        print(f"[optiq] error: {message}", file=sys.stderr, flush=True)
        time.sleep(0.3)
    finally:
        os.kill(int(parent), signal.SIGKILL)
"""


@contextmanager
def guarded(seconds: float, message: str) -> Iterator[None]:
    """Print a message and end this process if the block takes longer than some seconds.

    For calls into MLX that keep Python's other threads, and so the timer of `within`, from running.
    """
    python = [sys.executable, "-I", "-S", "-c", GUARD]
    words = [*python, str(seconds), message, str(os.getpid())]
    # In its own session, so that Ctrl-C in the terminal does not end it.
    start = partial(subprocess.Popen, words, start_new_session=True)
    with start(stdin=subprocess.PIPE, stdout=subprocess.DEVNULL):
        yield


def leave(message: str, status: int = 2) -> None:
    """End this process at once, even if other threads are waiting or nobody reads its stderr."""
    line = f"[optiq] error: {message}"
    threading.Thread(target=_print, args=(line,), daemon=True).start()
    time.sleep(0.3)  # older launchers do not read the last output of a process
    os._exit(status)


def _print(line: str) -> None:
    with suppress(OSError, ValueError):  # its reader has gone, or it is closed
        print(line, file=sys.stderr, flush=True)


def explain_termination(message: str) -> None:
    """Print a message when SIGTERM ends this process, unless that signal has a handler already.

    ``mlx.launch`` sends it to all processes as soon as one fails, also to those inside MLX, which a
    handler in Python would keep waiting. So a thread listens for it.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        with reader, writer:
            while received := reader.recv(1):
                if received[0] == signal.SIGTERM:
                    leave(message, 128 + signal.SIGTERM)
                if previous != -1:
                    with suppress(OSError):  # the reader may be gone
                        os.write(previous, received)

    threading.Thread(target=listen, name="optiq-sigterm", daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: None)
