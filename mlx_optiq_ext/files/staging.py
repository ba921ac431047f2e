"""Folders in which a process makes another one, and what becomes of them if it is killed.

Each holds a file that its process keeps locked. The system lets go of the lock with the process,
however it ends, so that neither a used-again process number nor another container can deceive.
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

#: The locked file; the number of its process stands in it.
OWNER = ".owner"


@dataclass(frozen=True)
class Holder:
    """A folder of this process.

    Attributes:
        folder: Where it is.
        lock: Descriptor of its locked file.
    """

    folder: Path
    lock: int

    def release(self) -> None:
        """Remove it with everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        unfinished.forget(self.folder)
        os.close(self.lock)


def claim(target: Path) -> Holder:
    """A new folder beside ``target``, in which only this process may make it.

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
    # As `claim` names them; the target "a" shall not take those of "a.b" for its own.
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
            folder.rmdir()  # killed before there was anything in it; else it is none of ours
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
        return None  # a file system without locks: nothing is known of its process
    finally:
        os.close(lock)


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Keep other processes from claiming in the same folder meanwhile."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
