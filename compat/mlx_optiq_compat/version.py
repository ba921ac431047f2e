"""Which mlx-lm and MLX an import would find, and how versions compare."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

_VERSION_LINE = re.compile(r"""^__version__\s*=\s*["']([^"']+)["']""", re.MULTILINE)
_RELEASE = re.compile(r"\d+(?:\.\d+)*")


def package_folder() -> Path | None:
    """The folder of the mlx_lm that an import finds, without importing it.

    Returns:
        The folder, or None when mlx-lm is not installed.
    """
    try:
        spec = importlib.util.find_spec("mlx_lm")
    except ValueError:
        # In sys.modules with no __spec__: somebody built the module by hand.
        paths = getattr(sys.modules.get("mlx_lm"), "__path__", None)
    else:
        paths = spec.submodule_search_locations if spec else None
    return next((Path(path) for path in paths or ()), None)


def installed_version() -> str | None:
    """The version of the mlx_lm that an import finds.

    It is read from ``mlx_lm/_version.py``, not from the installed metadata, which an editable
    mlx-lm leaves behind at an older version. Nothing of mlx-lm is imported, so this also works
    while mlx_lm itself is being imported.

    Returns:
        For example ``"0.32.2"``, or None when mlx-lm is missing or does not say.
    """
    folder = package_folder()
    if folder is None:
        return None
    try:
        text = (folder / "_version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = _VERSION_LINE.search(text)
    return found.group(1) if found else None


def installed_mlx() -> str | None:
    """The version of the installed MLX by its metadata, or None if there is none."""
    from importlib import metadata

    try:
        return metadata.version("mlx")
    except metadata.PackageNotFoundError:
        return None


def within(version: str, bounds: str) -> bool:
    """Whether a version lies in a range such as ``">=0.30.4,<0.31.2"``.

    A pre-release counts as the release that it leads to.

    Raises:
        ValueError: The version cannot be read, or a bound is of another kind.
    """
    for bound in bounds.split(","):
        if bound.startswith(">="):
            inside = release(version) >= release(bound[2:])
        elif bound.startswith("<"):
            inside = release(version) < release(bound[1:])
        else:
            raise ValueError(f"not a bound: {bound!r}")
        if not inside:
            return False
    return True


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version starts with, so that releases compare.

    At least three: ``"0.33.0.dev1"`` and ``"0.33"`` are both ``(0, 33, 0)``.

    Raises:
        ValueError: The version does not start with a number.
    """
    found = _RELEASE.match(version)
    if found is None:
        raise ValueError(f"not a version: {version!r}")
    numbers = tuple(int(part) for part in found.group().split("."))
    return numbers + (0,) * (3 - len(numbers))
