"""Writing without ever leaving half a file or half a folder."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError, OptiqError


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its name if the block succeeds.

    Raises:
        InputError: ``target`` exists already, or its parent cannot be written to.
        OptiqError: The disk filled up; nothing is left behind.
    """
    if target.exists():
        raise InputError(f"{target} exists already: remove it or name another output folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise InputError(f"cannot write beside {target}: {error}") from error
    try:
        yield holder / target.name
        (holder / target.name).replace(target)
    except (OSError, RuntimeError) as error:
        if not _disk_full(error):
            raise
        raise OptiqError(
            f"could not write {target} ({error}): free some disk space; nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _disk_full(error: OSError | RuntimeError) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return str(error).startswith("[write]")  # MLX's writer raises RuntimeError


def write_text(path: Path, text: str) -> None:
    """Write a file by moving a complete one into place."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON by moving a complete file into place."""
    write_text(path, json.dumps(value, indent=2) + "\n")
