"""Writes files and folders completely or not at all."""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError, OptiqError
from . import staging, unfinished


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target``, renamed to it if the block succeeds.

    Temporary folders that killed processes left of the same target are removed first.

    Raises:
        InputError: ``target`` exists already, another process is writing it, or its parent cannot
            be written to.
        OptiqError: The disk filled up, or something took the name meanwhile; nothing is left
            behind.
    """
    check_new(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        holder = staging.claim(target)
    except OSError as error:
        raise InputError(
            f"cannot write beside {target} ({error.strerror or error}): name another folder"
        ) from error
    try:
        yield holder.folder / target.name
        _move(holder.folder / target.name, target)
    except (OSError, RuntimeError) as error:
        if not _disk_full(error):
            raise
        raise OptiqError(
            f"could not write {target} ({error}): free some disk space; nothing was left behind"
        ) from error
    finally:
        holder.release()


def check_new(target: Path) -> None:
    """Refuse an output folder that exists already.

    Raises:
        InputError: The path exists.
    """
    try:
        target.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:  # such as a name longer than any
        raise InputError(f"cannot write {target} ({error}): name another folder") from error
    if not target.exists():
        raise InputError(
            f"{target} is a symbolic link to nothing: remove it or name another output folder"
        )
    raise InputError(f"{target} exists already: remove it or name another output folder")


def check_room(folder: Path, needed: float) -> None:
    """Refuse to write more than the disk has room for.

    Args:
        folder: The folder to write to.
        needed: Bytes, roughly.

    Raises:
        InputError: There is less free space.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the disk of {folder} has {free / 1e9:.2f} GB free, and about {needed / 1e9:.2f} GB "
            "will be written: free some space or name a folder on another disk"
        )


def _move(made: Path, target: Path) -> None:
    try:
        made.replace(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise OptiqError(
            f"{target} appeared while it was being made: what is there stays, and nothing of this "
            "run was kept; name another output folder"
        ) from error


def _disk_full(error: OSError | RuntimeError) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return str(error).startswith("[write]")  # MLX's writer raises RuntimeError


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path``, with its suffix, renamed to it if the block succeeds.

    Raises:
        OSError: The folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    with unfinished.noted(temporary):  # before the file exists, so that no interruption can miss it
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
            yield temporary
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file completely or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")
