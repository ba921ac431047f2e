"""Finished items on disk: an evaluation that was interrupted goes on where it stopped."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..errors import InputError

#: Bytes of a journal that is read.
LARGEST = 128 << 20


@dataclass(frozen=True)
class Journal:
    """A folder of finished items, named by everything that decides them."""

    folder: Path

    @classmethod
    def open(cls, key: Mapping[str, Any]) -> "Journal":
        """The journal of a key; its folder is made when something is put there."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        return cls(files.cache_dir() / "evaluation" / name[:32])

    def arrays(self, name: str) -> dict[str, np.ndarray] | None:
        """Arrays that were put under a name, or None."""
        try:
            with np.load(self.folder / f"{name}.npz") as stored:
                return {key: stored[key] for key in stored.files}
        except (OSError, ValueError, EOFError):
            return None

    def put_arrays(self, name: str, **arrays: np.ndarray) -> None:
        """Put arrays under a name, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(suffix=".npz", dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as stream:
                np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType]
            Path(temporary).replace(self.folder / f"{name}.npz")
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def items(self) -> dict[str, Any]:
        """JSON items by name; a line that was cut off is left out."""
        found = {}
        try:
            lines = files.read_lines(self.folder / "items.jsonl", LARGEST)
        except InputError:
            return found
        for _, line in lines:
            try:
                entry = files.parse_json(line, "an item", files.REQUEST)
                found[entry["name"]] = entry["value"]
            except (InputError, KeyError, TypeError):
                continue
        return found

    def put_item(self, name: str, value: Any) -> None:
        """Append a JSON item."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "items.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"name": name, "value": value}) + "\n")

    def discard(self) -> None:
        """Remove it."""
        shutil.rmtree(self.folder, ignore_errors=True)
