"""Files and folders that are being written, to be removed if the process ends at once."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_noted: set[Path] = set()


@contextmanager
def noted(path: Path) -> Iterator[None]:
    """Register a file or folder while the block writes it.

    If an interruption keeps the block from cleaning up, the entry stays.
    """
    note(path)
    try:
        yield
    finally:
        if not path.exists():
            forget(path)


def note(path: Path) -> None:
    """Register an unfinished file or folder."""
    _noted.add(path.absolute())


def forget(path: Path) -> None:
    """Remove the entry of a finished or removed file or folder."""
    _noted.discard(path.absolute())


def discard() -> None:
    """Remove all unfinished files and folders; for a process that ends at once."""
    for path in tuple(_noted):
        for _ in range(2):  # a thread may have added a file during the first round
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
