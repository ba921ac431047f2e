"""A client's connection with limits of time, and a server's with a limit of number."""

import contextlib
import io
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

#: Bytes read of a request that was refused, so that its sender can read the answer, and seconds.
DRAINED, LINGER = 1 << 20, 1.0
#: Bytes of an answer that the system keeps for a client that does not read. Its own choice is
#: megabytes, so that nobody would notice for minutes.
KEPT = 1 << 15
#: Seconds between two looks whether a client is still there.
INTERVAL = 0.2


class Connection:
    """A socket as request handlers use it, with limits of time.

    A whole request must arrive within ``patience`` seconds of its connection, and each piece of the
    answer must be accepted within ``patience`` seconds. Everything else is the socket's own.

    Args:
        wire: The accepted socket.
        patience: Seconds.

    Attributes:
        sent: Bytes that were sent.
    """

    def __init__(self, wire: socket.socket, patience: float):
        self.sent = 0
        self._wire = wire
        self._patience = patience
        self._end = time.monotonic() + patience
        self._looked = 0.0
        self._ends: list[Callable[[], object]] = []
        with contextlib.suppress(OSError):
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KEPT)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wire, name)

    def makefile(self, mode: str = "r", buffering: int = -1) -> Any:
        """A reader that raises TimeoutError once the request takes too long."""
        assert mode == "rb", mode
        return io.BufferedReader(_Reader(self), max(buffering, io.DEFAULT_BUFFER_SIZE))

    def recv_into(self, buffer: Any) -> int:
        """Receive what there is, within the limit of time.

        Raises:
            TimeoutError: The request did not arrive in time.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request did not arrive in time")
        self._wire.settimeout(left)
        return self._wire.recv_into(buffer)

    def sendall(self, data: Any) -> None:
        """Send all of ``data``.

        Raises:
            TimeoutError: The client does not read.
        """
        # A socket's time limit is for the whole call.
        self._wire.settimeout(self._patience)
        self._wire.sendall(data)
        self.sent += len(data)

    def at_end(self, done: Callable[[], object]) -> None:
        """Have ``done`` called when the connection has been served."""
        self._ends.append(done)

    def end(self) -> None:
        """It has been served, or its client left."""
        while self._ends:
            self._ends.pop()()

    def check(self) -> None:
        """See from time to time whether the client is still there.

        Raises:
            ConnectionAbortedError: It has closed the connection.
        """
        now = time.monotonic()
        if now - self._looked < INTERVAL:
            return
        self._looked = now
        if gone(self._wire):
            raise ConnectionAbortedError("the client closed the connection")


class _Reader(io.RawIOBase):
    def __init__(self, connection: Connection):
        super().__init__()
        self._connection = connection

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._connection.recv_into(buffer)


def gone(wire: socket.socket) -> bool:
    """Whether the other side has closed a connection. Reads nothing, and does not wait."""
    try:
        watch = select.poll()
        watch.register(wire, select.POLLIN)
        if not watch.poll(0):
            return False
        return wire.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def turn_away(wire: socket.socket, answer: bytes, *, linger: float = LINGER) -> None:
    """Send an answer on a connection that is not served, and end it.

    Args:
        wire: The accepted socket.
        answer: The whole answer.
        linger: Seconds that it may take at most.
    """
    with contextlib.suppress(OSError):
        wire.settimeout(linger)
        wire.sendall(answer)
        drain(wire, linger=linger)


def drain(wire: socket.socket, *, limit: int = DRAINED, linger: float = LINGER) -> None:
    """Send no more, and read what a client still sends: unread data would discard the answer."""
    end, left = time.monotonic() + linger, limit
    with contextlib.suppress(OSError):
        wire.shutdown(socket.SHUT_WR)
        while left > 0 and (wait := end - time.monotonic()) > 0:
            wire.settimeout(wait)
            part = wire.recv(min(left, 1 << 16))
            if not part:
                return
            left -= len(part)


class Slots:
    """Connections that are served at a time.

    Args:
        number: How many at most.
    """

    def __init__(self, number: int):
        self._free = threading.BoundedSemaphore(number)

    def take(self) -> bool:
        """Take a slot; False if all are taken."""
        return self._free.acquire(blocking=False)

    def give(self) -> None:
        """Give a slot back."""
        self._free.release()
