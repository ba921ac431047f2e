"""Records of finished work, one JSON line each, that outlive the run that made them.

Each line has a checksum, because disks, copies and editors may damage files silently. Unreadable
lines are left out. If the folder cannot be written to, the work goes on and is not kept. Both print
one line.
"""

import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .cache import ENVIRONMENT
from .documents import REQUEST, parse_json
from .reading import MEGABYTE, read_lines

#: Bytes of a file that is read, and written on.
LARGEST = 128 * MEGABYTE

_SUM = "sum"

#: Files that this process read or wrote, and the lines that it printed.
_kept: set[Path] = set()
_said: set[str] = set()


def records_kept() -> bool:
    """Whether this process read or wrote records that the next run can use."""
    return bool(_kept)


def note_kept(path: Path) -> None:
    """Note that a file of finished work was read or written."""
    _kept.add(path)


def read_records(path: Path, limit: int = LARGEST) -> Iterator[dict[str, Any]]:
    """The records of a file; none if there is no such file.

    Args:
        path: The file.
        limit: Bytes beyond which it is not read.
    """
    damaged = 0
    try:
        for _, line in read_lines(path, limit):
            entry = _checked(line)
            if entry is None:
                damaged += 1
                continue
            _kept.add(path)
            yield entry
    except InputError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return
        say(f"[optiq] Measurements on disk are ignored: {error} ({ENVIRONMENT})")
    if damaged:
        left_out(path, damaged)


def left_out(path: Path, count: int) -> None:
    """Print that some records of a file are unusable."""
    lines = "1 line" if count == 1 else f"{count} lines"
    say(f"[optiq] {lines} of {path} cannot be used and will be measured again ({ENVIRONMENT})")


def append_records(path: Path, entries: Iterable[Mapping[str, Any]], limit: int = LARGEST) -> None:
    """Append records to a file, at once."""
    lines = [_line(entry) for entry in entries]
    if not lines:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > limit:
            raise OSError(None, f"{path} is full")
        # The first line break ends a line that an earlier run may have left incomplete.
        with path.open("a", encoding="utf-8") as stream:
            stream.write("\n" + "\n".join(lines))
        _kept.add(path)
    except OSError as error:
        not_kept(path.parent, error)


def not_kept(folder: Path, error: OSError) -> None:
    """Print that measurements cannot be kept."""
    say(
        f"[optiq] Measurements are not kept: cannot write to {folder} ({error.strerror or error}); "
        f"set {ENVIRONMENT} to a folder that can be written to"
    )


def say(line: str) -> None:
    """Print a line once."""
    if line not in _said:
        _said.add(line)
        print(line, file=sys.stderr)


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps({**entry, _SUM: _checksum(entry)})


def _checksum(entry: Mapping[str, Any]) -> str:
    as_read = json.loads(json.dumps(entry))  # keys that were numbers are sorted as text
    return f"{zlib.crc32(json.dumps(as_read, sort_keys=True).encode()):08x}"


def _checked(line: str) -> dict[str, Any] | None:
    """A line's record; None if the line is incomplete, damaged or in another format."""
    try:
        entry = parse_json(line, "a record", REQUEST)
    except InputError:
        return None
    if not isinstance(entry, dict) or entry.pop(_SUM, None) != _checksum(entry):
        return None
    return entry
