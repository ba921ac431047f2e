"""A folder of blocks that several processes may share.

The files are the index: ``SPACE/KEY.safetensors`` is a block, and ``SPACE/PARENT/LENGTH-KEY...`` a
snapshot, or the end of a prompt, so many tokens behind the block ``PARENT``. Their times of change
say when they were used last.
"""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from .._status import note
from ..errors import InputError
from . import block_file
from .block_file import PART, SUFFIX, Piece
from .chain import LENGTH

#: Seconds after which an unfinished file is of a process that was killed.
ABANDONED = 600.0
#: Share of the size that is written, in any process, before the folder is looked at again.
_SLACK = 0.02
_OURS = re.compile(
    rf"(\d+-)?[0-9a-f]{{{LENGTH}}}{re.escape(SUFFIX)}"
    rf"|\.(\d+-)?[0-9a-f]{{{LENGTH}}}{re.escape(SUFFIX)}\.[0-9a-f]+{re.escape(PART)}"
)


@dataclass
class BlockStore:
    """The blocks in a folder.

    Attributes:
        folder: The folder.
        limit: Bytes that all of its files may take.
        writable: Whether blocks are written; no longer after the disk was full.
    """

    folder: Path
    limit: int
    writable: bool = True
    _since: float = field(default=float("inf"))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, folder: Path, limit: int) -> "BlockStore":
        """Open a folder, which is made if it is missing, for its owner only.

        Raises:
            InputError: It cannot be used.
        """
        if limit < 1:
            raise InputError("the size of a prompt cache must be 1 byte or more")
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with os.scandir(folder):
                pass
        except OSError as error:
            raise InputError(
                f"the prompt cache {folder} cannot be used ({error.strerror or error}): name "
                "another folder"
            ) from error
        return cls(folder.absolute(), limit)

    def has(self, space: str, key: str) -> bool:
        """Whether there is a file of a block."""
        return self._block(space, key).exists()

    def has_snapshot(self, space: str, parent: str, length: int, key: str) -> bool:
        """Whether there is a file of a snapshot."""
        return self._snapshot(space, parent, length, key).exists()

    def block(self, space: str, key: str) -> Piece | None:
        """A block; None if it is absent or damaged."""
        return self._read(self._block(space, key), key)

    def snapshot(self, space: str, parent: str, length: int, key: str) -> Piece | None:
        """A snapshot; None if it is absent or damaged."""
        return self._read(self._snapshot(space, parent, length, key), key)

    def snapshots(self, space: str, parent: str) -> list[tuple[int, str]]:
        """Length behind a block and key of each snapshot, the longest first."""
        found = []
        for entry in _entries(self.folder / space / parent):
            length, _, rest = entry.name.partition("-")
            if length.isdecimal() and rest.endswith(SUFFIX):
                found.append((int(length), rest.removesuffix(SUFFIX)))
        return sorted(found, reverse=True)

    def write(self, space: str, piece: Piece) -> None:
        """Write a block unless it is there."""
        self._write(self._block(space, piece.key), piece)

    def write_snapshot(
        self, space: str, parent: str, length: int, piece: Piece, *, replace: bool = False
    ) -> None:
        """Write a snapshot; one that is there stays unless it is to be replaced."""
        self._write(self._snapshot(space, parent, length, piece.key), piece, replace=replace)

    def drop_snapshot(self, space: str, parent: str, length: int, key: str) -> None:
        """Remove a snapshot."""
        self._remove(self._snapshot(space, parent, length, key))

    def used(
        self, space: str, keys: Sequence[str], snapshots: Sequence[tuple[str, int, str]] = ()
    ) -> None:
        """Note that a chain of blocks was used, and snapshots behind it.

        The first block counts as the last one used: without it the others are of no use.
        """
        now = time.time_ns()
        paths: list[Path] = [self._block(space, key) for key in keys]
        paths += [self._snapshot(space, *each) for each in snapshots]
        for place, path in enumerate(paths):
            with suppress(OSError):
                os.utime(path, ns=(now, now - place * 1000))

    def evict(self) -> None:
        """Remove what was used least recently until the folder is within its size."""
        found, total = [], 0
        for path in walk(self.folder):
            try:
                state = path.stat()
            except OSError:
                continue
            if path.name.endswith(PART):
                if time.time() - state.st_mtime > ABANDONED:
                    path.unlink(missing_ok=True)
                continue
            found.append((state.st_mtime_ns, state.st_size, path))
            total += state.st_size
        for _, size, path in sorted(found, key=lambda each: each[0]):
            if total <= self.limit * (1 - _SLACK):
                break
            self._remove(path)
            total -= size

    def clear(self) -> None:
        """Remove all blocks."""
        for path in walk(self.folder):
            self._remove(path)

    def _write(self, path: Path, piece: Piece, *, replace: bool = False) -> None:
        if not self.writable or (path.exists() and not replace):
            return
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            size = block_file.write(path, piece)
        except OSError as error:
            self.writable = False
            note(f"prompts are no longer written to {self.folder}: free some disk space", error)
            return
        with self._lock:
            self._since += size
            due = self._since > self.limit * _SLACK
            if due:
                self._since = 0
        if due:
            self.evict()

    def _read(self, path: Path, key: str) -> Piece | None:
        if not path.exists():
            return None
        try:
            return block_file.read(path, key)
        except InputError as error:
            if path.exists():
                print(f"[optiq] {error}", file=sys.stderr)
                self._remove(path)
            return None

    def _remove(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            for folder in path.relative_to(self.folder).parents[:-1]:
                (self.folder / folder).rmdir()  # succeeds for the last file of a folder

    def _block(self, space: str, key: str) -> Path:
        return self.folder / space / f"{key}{SUFFIX}"

    def _snapshot(self, space: str, parent: str, length: int, key: str) -> Path:
        return self.folder / space / parent / f"{length}-{key}{SUFFIX}"


def walk(folder: Path, depth: int = 2) -> Iterator[Path]:
    """The files of blocks and snapshots, unfinished ones too; files of others are left out."""
    for entry in _entries(folder):
        if entry.is_dir(follow_symlinks=False):
            if depth:
                yield from walk(Path(entry.path), depth - 1)
        elif _OURS.fullmatch(entry.name):
            yield Path(entry.path)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:
        return []
