"""What a folder of prompts holds."""

from pathlib import Path

from ..errors import InputError
from . import block_file
from .block_file import PART, SUFFIX
from .store import BlockStore, walk


def summary(folder: Path) -> list[str]:
    """Lines that say what a folder holds and whether it verifies. All files are read."""
    if not folder.is_dir():
        return [f"prompt cache {folder}: no such folder"]
    lines, damaged, total = [], 0, 0
    spaces: dict[str, list[int]] = {}
    for path in walk(folder):
        if path.name.endswith(PART):
            continue
        parts = path.relative_to(folder).parts
        snapshot = len(parts) == 3
        key = path.name.removesuffix(SUFFIX).rpartition("-")[2]
        counts = spaces.setdefault(parts[0], [0, 0, 0])
        try:
            block_file.read(path, key)
            size = path.stat().st_size
        except (InputError, OSError):
            damaged += 1
            continue
        counts[snapshot] += 1
        counts[2] += size
        total += size
    for space, (blocks, ends, size) in sorted(spaces.items()):
        lines.append(f"  {space}: {blocks} blocks, {ends} snapshots and ends, {size / 1e9:.2f} GB")
    verdict = "all verify" if not damaged else f"{damaged} damaged, which are never used"
    return [f"prompt cache {folder}: {total / 1e9:.2f} GB, {verdict}", *lines]


def clear(folder: Path) -> None:
    """Remove all prompts from a folder.

    Raises:
        InputError: It cannot be used.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    BlockStore.open(folder, 1).clear()
