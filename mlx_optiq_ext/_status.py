"""Describes what is active, what is off, and why."""

import sys
from collections.abc import Callable
from importlib import metadata

from . import _activation
from ._version import __version__

_reports: list[Callable[[bool, bool], list[str]]] = []
#: Fallbacks and other unusual events of this process, one line each.
_notes: list[str] = []


def register(lines: Callable[[bool, bool], list[str]]) -> None:
    """Let the hooks add their lines; the library itself does not know them.

    Args:
        lines: Given `load` and `verbose` as `status` takes them.
    """
    if lines not in _reports:
        _reports.append(lines)


def note(what: str, why: Exception | None = None) -> None:
    """Print a fallback or another unusual event on stderr, once, and keep it for `status`.

    Args:
        what: One line.
        why: The exception that led to it; its first sentence is shown.
    """
    reason = " ".join(str(why).split()).partition(". ")[0]
    line = what if why is None else f"{what} ({type(why).__name__}: {reason})"
    if line not in _notes:
        _notes.append(line)
        print(f"[optiq] {line}", file=sys.stderr)


def status(*, load: bool = False, verbose: bool = False) -> str:
    """Describe this installation as text.

    Args:
        load: Whether to import mlx-lm's patched modules first, so that every patch can be proved
            live; else a patch whose module is not loaded yet is listed as waiting.
        verbose: Whether to list each feature with the reason why it is on or off, and each patch
            with whether it is live.

    Returns:
        Versions, how activation happened, the verdict on the installed mlx-lm, the features that
        are on, those that are off with the reason, and the plugins.
    """
    _activation.arm()
    lines = [
        f"mlx-optiq-ext {__version__}, Python {sys.version.split()[0]}",
        ", ".join(f"{name} {_installed(name)}" for name in ("mlx-lm", "mlx", "wrapt", "pluggy")),
        f"start-up file (.pth): {'ran' if 'site' in _activation.sources else 'did not run'}"
        + ("" if "site" in _activation.sources else _PTH_HINT),
    ]
    if _activation.switched_off():
        lines.append("switched off: MLX_OPTIQ_EXT=0 is set, mlx-lm runs as stock")
    elif _activation.failure:
        lines.append(f"off: arming failed with {_activation.failure}")
    for report in _reports:
        lines.extend(report(load, verbose))
    if _notes:
        lines += ["notes:", *(f"  {line}" for line in _notes)]
    return "\n".join(lines)


_PTH_HINT = (
    " (import mlx_optiq_ext before mlx_lm; on macOS a hidden .pth is skipped:"
    " chflags -R nohidden <the virtual environment>)"
)


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "is not installed"
