"""Results as Markdown and JSON."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import files
from .._version import versions

Figures = Mapping[str, float | str]


@dataclass(frozen=True)
class Report:
    """One evaluation.

    Attributes:
        task: The task's name.
        data: The data set's name.
        settings: Other settings that decide the figures.
        columns: Model, or model against baseline -> figures.
        notes: Sentences below the table.
        noise: Figure -> the value below which it is rounding noise.
    """

    task: str
    data: str
    settings: dict[str, Any]
    columns: dict[str, Figures]
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=versions)
    noise: Mapping[str, float] = field(default_factory=dict)

    def markdown(self) -> str:
        """A table with a row per figure."""
        names = list(dict.fromkeys(name for column in self.columns.values() for name in column))
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        lines = [
            f"## {self.task} on {self.data}",
            "",
            *([settings, ""] if settings else []),
            "| | " + " | ".join(self.columns) + " |",
            "|---|" + "---:|" * len(self.columns),
        ]
        for name in names:
            least = self.noise.get(name, 0.0)
            cells = [_cell(name, column.get(name), least) for column in self.columns.values()]
            lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
        made = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return "\n".join([*lines, "", *self.notes, *([""] if self.notes else []), made, ""])

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Write ``NAME.md`` and ``NAME.json`` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        table, data = folder / f"{name}.md", folder / f"{name}.json"
        files.write_text(table, self.markdown())
        files.write_json(data, _plain(asdict(self)))
        return table, data


def _cell(name: str, value: float | str | None, least: float = 0.0) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return str(value)
    if abs(value) < least:
        return f"< {least:.0e}".replace("e-0", "e-")
    if name.endswith("bytes") or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}".replace(",", " ")
    return f"{value:.4g}" if abs(value) < 1 else f"{value:.6g}"


def _plain(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
