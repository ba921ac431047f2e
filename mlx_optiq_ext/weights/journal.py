"""Measurements kept on disk, so that a sweep survives Ctrl-C and is never run twice."""

import hashlib
import json
from pathlib import Path
from typing import Any

from .. import files
from .packing import Packing


def model_digest(folder: Path) -> str:
    """Hash of a model folder's config and weights.

    Every byte counts: a fine-tune may keep names, sizes and dates.
    """
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("model*.safetensors"))]:
        if path.exists():
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


class Journal:
    """A JSON-lines file of probes, keyed by everything that decides their result.

    With ``key`` None it is kept in memory only.
    """

    def __init__(self, key: dict[str, Any] | None):
        self.path: Path | None = None
        self._known: dict[tuple[str, Packing], float] = {}
        if key is not None:
            name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
            self.path = files.cache_dir() / "sensitivity" / f"{name}.jsonl"
            self._read(self.path)

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError:
            return
        for line in lines:
            try:
                entry = json.loads(line)
                packing = Packing(entry["bits"], entry["group_size"])
                self._known[entry["path"], packing] = float(entry["kl"])
            except (ValueError, KeyError, TypeError):
                continue  # the last line of an interrupted run may be cut off

    def get(self, path: str, packing: Packing) -> float | None:
        """A stored measurement in nats, or None."""
        return self._known.get((path, packing))

    def add(self, path: str, packing: Packing, kl: float) -> None:
        """Store one measurement at once."""
        self.add_all(path, {packing: kl})

    def add_all(self, path: str, costs: dict[Packing, float]) -> None:
        """Store one tensor's measurements at once."""
        self._known.update({(path, packing): kl for packing, kl in costs.items()})
        if self.path is None:
            return
        lines = [
            json.dumps({"path": path, "bits": p.bits, "group_size": p.group_size, "kl": kl})
            for p, kl in costs.items()
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A line break first closes a line that an earlier run may have left cut off.
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write("\n" + "\n".join(lines))

    def __len__(self) -> int:
        return len(self._known)
