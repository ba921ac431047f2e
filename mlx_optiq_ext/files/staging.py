"""Temporary folders for making an output folder; those of killed processes are removed.

Each contains a file that its process keeps locked. The system releases the lock when the process
ends, so a reused process number or another container cannot be mistaken for the owner.
"""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from . import unfinished

#: The locked file, which contains its process's number.
OWNER = ".owner"


@dataclass(frozen=True)
class Holder:
    """A folder of this process.

    Attributes:
        folder: The folder's path.
        lock: Descriptor of the locked file.
    """

    folder: Path
    lock: int

    def release(self) -> None:
        """Remove the folder with its contents."""
        shutil.rmtree(self.folder, ignore_errors=True)
        unfinished.forget(self.folder)
        os.close(self.lock)


def claim(target: Path) -> Holder:
    """Create a folder beside ``target``, in which only this process makes the target.

    Folders of the same target whose process is dead are removed.

    Raises:
        InputError: Another process is making the target.
        OSError: The folder beside it cannot be written to.
    """
    with _exclusive(target.parent):
        for folder in _left(target):
            owner = _living_owner(folder)
            if owner is not None:
                raise InputError(
                    f"{target} is being written by another process ({owner}): wait for it or name "
                    "another output folder"
                )
        folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        unfinished.note(folder)
        folder.mkdir(mode=0o700)
        lock = os.open(folder / OWNER, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(lock, str(os.getpid()).encode())
        return Holder(folder, lock)


def _left(target: Path) -> list[Path]:
    # Names as `claim` makes them; target "a" must not match folders of target "a.b".
    name = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}")
    return [
        path
        for path in target.parent.iterdir()
        if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]


def _living_owner(folder: Path) -> str | None:
    """The process that has a folder; one whose process is dead is removed."""
    try:
        lock = os.open(folder / OWNER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        with suppress(OSError):
            folder.rmdir()  # fails unless its process was killed before it wrote anything
        return None
    except OSError:
        return None  # another user's
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    except BlockingIOError:
        return f"process {os.read(lock, 20).decode('ascii', 'replace') or 'unknown'}"
    except OSError:
        return None  # a file system without locks: its process is unknown
    finally:
        os.close(lock)


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Keep other processes from claiming in the same folder at the same time."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
