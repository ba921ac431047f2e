"""Keeps measurements on disk, so that an interrupted sweep continues and none is run twice."""

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from .. import distributed, files

#: Bytes of a file; a model of 1,000 tensors and 19 candidates takes 3 MB.
LARGEST = 64 << 20


def usable(value: Any) -> TypeGuard[float]:
    """Whether a value is a measured divergence: a finite number that is not negative."""
    return type(value) in (int, float) and 0 <= value <= sys.float_info.max


class Journal:
    """A JSON-lines file of measured numbers, each under its own key.

    The file's name is a digest of everything that decides all its measurements, such as the model
    and the calibration data. A key identifies one measurement; it is any JSON value.

    A damaged record, or one that is not a finite number from 0 on, is measured again. If the folder
    cannot be written to, nothing is kept. Both print one line.

    Of several processes only the first one reads and writes the file; what the others measure
    reaches it, and all of them, at `exchange`.
    """

    def __init__(self, name: Mapping[str, Any] | None):
        """Read the stored measurements.

        Args:
            name: Everything that decides the measurements, as JSON can hold it; None keeps them in
                memory only.
        """
        self.path: Path | None = None
        if name is not None:
            digest = hashlib.sha256(json.dumps(name, sort_keys=True).encode()).hexdigest()[:32]
            self.path = files.cache_dir() / "sensitivity" / f"{digest}.jsonl"
        self._known: dict[str, float] = distributed.first(self._read)
        self._added: dict[str, float] = {}

    def _read(self) -> dict[str, float]:
        found: dict[str, float] = {}
        useless = 0
        for entry in files.read_records(self.path, LARGEST) if self.path else ():
            value = entry.get("value")
            if "key" in entry and usable(value):
                found[_text(entry["key"])] = float(value)
            else:
                useless += 1
        if useless and self.path:
            files.left_out(self.path, useless)
        return found

    def get(self, key: Any) -> float | None:
        """A stored measurement, or None."""
        return self._known.get(_text(key))

    def add(self, key: Any, value: float) -> None:
        """Store one measurement at once."""
        self.add_all([(key, value)])

    def add_all(self, measured: Iterable[tuple[Any, float]]) -> None:
        """Store some measurements, each with its key; a single process writes them at once."""
        found = {_text(key): value for key, value in measured}
        self._known.update(found)
        if distributed.size() > 1:
            self._added.update(found)
        else:
            self._write(found)

    def exchange(self) -> None:
        """Share what each process has measured since the last call."""
        if distributed.size() == 1:
            return
        found: dict[str, float] = {}
        for part in distributed.gathered(self._added):
            found.update(part)
        self._known.update(found)
        self._added = {}
        if distributed.leads():
            self._write(found)

    def _write(self, found: dict[str, float]) -> None:
        if self.path is not None:
            entries = [{"key": json.loads(k), "value": v} for k, v in found.items() if usable(v)]
            files.append_records(self.path, entries, LARGEST)

    def __len__(self) -> int:
        return len(self._known)


def _text(key: Any) -> str:
    return json.dumps(key, sort_keys=True)
