"""Bounded reading of untrusted files."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import InputError

MEGABYTE = 1 << 20

#: Bytes of a text to calibrate or evaluate on; far more than any run uses.
LONGEST_TEXT = 64 * MEGABYTE


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading, through symbolic links as the Hub's cache has them.

    Raises:
        InputError: The file is missing, unreadable, or a folder, pipe, socket or device.
    """
    try:
        # A pipe would wait for a writer, and a device can do anything when it is opened.
        _check_regular(path, path.stat().st_mode)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as stream:
            _check_regular(path, os.fstat(descriptor).st_mode)
            yield stream
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, InputError) or "null" not in str(error):
            raise
        raise InputError(f"cannot read {str(path)!r}: a name holds no null byte") from error


def _check_regular(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise InputError(f"cannot read {path}: it is a folder, name a file")
    if not stat.S_ISREG(mode):
        raise InputError(f"cannot read {path}: it is a pipe, socket or device, name a regular file")


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a whole file of at most ``limit`` bytes.

    Raises:
        InputError: It is larger, missing, unreadable or no regular file.
    """
    with open_regular(path) as stream:
        # The file may be longer than the file system says.
        size = os.fstat(stream.fileno()).st_size
        content = stream.read(limit + 1) if size <= limit else b""
    if size > limit or len(content) > limit:
        raise InputError(
            f"{path} is larger than {limit / MEGABYTE:.0f} MB, the most that is read of such a "
            "file: is it another one?"
        )
    return content


def read_text(path: Path, limit: int = LONGEST_TEXT) -> str:
    """Read a UTF-8 file of at most ``limit`` bytes.

    Raises:
        InputError: As for `read_bytes`, or it is not UTF-8.
    """
    return decoded(read_bytes(path, limit), str(path))


def read_lines(path: Path, limit: int = LONGEST_TEXT) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, with their numbers from 1 on.

    Raises:
        InputError: As for `read_text`, before the first line.
    """
    # Not splitlines: JSON strings may contain other characters that it treats as line ends.
    lines = read_text(path, limit).split("\n")
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def decoded(content: bytes, where: str) -> str:
    """Decode UTF-8.

    Raises:
        InputError: The bytes are not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} is not UTF-8 (byte {error.start}): save it in that encoding"
        ) from error
