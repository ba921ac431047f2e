"""What this process has not finished writing, to be removed if it must end at once."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_noted: set[Path] = set()


@contextmanager
def noted(path: Path) -> Iterator[None]:
    """Note a file or folder while the block writes it.

    An interruption may come where no block can clean up behind it: the note stays then.
    """
    note(path)
    try:
        yield
    finally:
        if not path.exists():
            forget(path)


def note(path: Path) -> None:
    """Note a file or folder that is not finished."""
    _noted.add(path.absolute())


def forget(path: Path) -> None:
    """Forget one that is finished or removed."""
    _noted.discard(path.absolute())


def discard() -> None:
    """Remove all of it. For a process that ends at once, whatever its other threads still write."""
    for path in tuple(_noted):
        for _ in range(2):  # a thread may have added a file behind the first round
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
