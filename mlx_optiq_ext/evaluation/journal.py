"""Finished items on disk: an evaluation that was interrupted goes on where it stopped."""

import hashlib
import json
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import files

#: Bytes of a journal that is read.
LARGEST = 128 << 20


@dataclass(frozen=True)
class Journal:
    """A folder of finished items, named by a digest of everything that decides them.

    Damaged items are left out. If the folder cannot be written to, nothing is kept for another run.
    Both print one line.
    """

    folder: Path
    _unwritten: dict[str, dict[str, np.ndarray]] = field(default_factory=dict, compare=False)

    @classmethod
    def open(cls, key: Mapping[str, Any]) -> "Journal":
        """Open the journal of a key; its folder is created with the first item."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        return cls(files.cache_dir() / "evaluation" / name[:32])

    def arrays(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays stored under a name, or None."""
        if name in self._unwritten:
            return self._unwritten[name]
        path = self._file(name)
        try:
            if path.stat().st_size > LARGEST:
                raise ValueError("larger than any that is written")
            with np.load(path, allow_pickle=False) as stored:
                found = {key: stored[key] for key in stored.files}
            files.note_kept(path)
            return found
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
            files.left_out(path, 1)
            return None

    def put_arrays(self, name: str, **arrays: np.ndarray) -> None:
        """Store arrays under a name, completely or not at all."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with files.replaced(self._file(name)) as temporary, temporary.open("wb") as stream:
                np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType]
            files.note_kept(self._file(name))
        except OSError as error:
            files.not_kept(self.folder, error)
            self._unwritten[name] = arrays

    def drop_arrays(self, name: str) -> None:
        """Remove the arrays of a name."""
        if self._unwritten.pop(name, None) is None:
            self._file(name).unlink(missing_ok=True)

    def items(self) -> dict[str, Any]:
        """JSON items by name."""
        found = {}
        for entry in files.read_records(self._items, LARGEST):
            if isinstance(entry.get("name"), str) and "value" in entry:
                found[entry["name"]] = entry["value"]
        return found

    def put_item(self, name: str, value: Any) -> None:
        """Append a JSON item."""
        files.append_records(self._items, [{"name": name, "value": value}], LARGEST)

    def discard(self) -> None:
        """Remove the journal's folder."""
        self._unwritten.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _items(self) -> Path:
        return self.folder / "items.jsonl"

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.npz"
