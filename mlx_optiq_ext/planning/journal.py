"""Measurements kept on disk, so that a sweep survives Ctrl-C and is never run twice."""

import hashlib
import json
from pathlib import Path
from typing import Any

from .. import distributed, files
from ..weights.precision import Precision

#: Tensor path and precision -> KL in nats.
Measured = dict[tuple[str, Precision], float]


class Journal:
    """A JSON-lines file of probes, keyed by everything that decides their result.

    With ``key`` None it is kept in memory only. Of several ranks only the first one reads and
    writes the file; what the others measure reaches it, and all of them, at `exchange`.
    """

    def __init__(self, key: dict[str, Any] | None):
        self.path: Path | None = None
        if key is not None:
            name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
            self.path = files.cache_dir() / "sensitivity" / f"{name}.jsonl"
        self._known: Measured = distributed.first(self._read)
        self._added: Measured = {}

    def _read(self) -> Measured:
        found: Measured = {}
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path else []
        except OSError:
            return found
        for line in lines:
            try:
                entry = json.loads(line)
                precision = Precision(entry["bits"], entry["group_size"])
                found[entry["path"], precision] = float(entry["kl"])
            except (ValueError, KeyError, TypeError):
                continue  # the last line of an interrupted run may be cut off
        return found

    def get(self, path: str, precision: Precision) -> float | None:
        """A stored measurement in nats, or None."""
        return self._known.get((path, precision))

    def add(self, path: str, precision: Precision, kl: float) -> None:
        """Store one measurement at once."""
        self.add_all(path, {precision: kl})

    def add_all(self, path: str, costs: dict[Precision, float]) -> None:
        """Store one tensor's measurements, alone at once."""
        found = {(path, precision): kl for precision, kl in costs.items()}
        self._known.update(found)
        if distributed.size() > 1:
            self._added.update(found)
        else:
            self._write(found)

    def exchange(self) -> None:
        """Let all ranks know what each has measured since the last time."""
        if distributed.size() == 1:
            return
        found: Measured = {}
        for part in distributed.gathered(self._added):
            found.update(part)
        self._known.update(found)
        self._added = {}
        if distributed.leads():
            self._write(found)

    def _write(self, found: Measured) -> None:
        if self.path is None or not found:
            return
        lines = [
            json.dumps({"path": path, "bits": p.bits, "group_size": p.group_size, "kl": kl})
            for (path, p), kl in found.items()
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A line break first closes a line that an earlier run may have left cut off.
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write("\n" + "\n".join(lines))

    def __len__(self) -> int:
        return len(self._known)
