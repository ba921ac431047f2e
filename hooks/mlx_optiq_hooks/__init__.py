"""The edge to mlx-lm: flags, patches and the plugin hooks. Everything here is thin."""

from mlx_optiq_ext import _status

from .engine import main_module
from .installation import gate, patch_engine, plugin_manager, sensitivity_methods, tables

__all__ = [
    "arm",
    "disarm",
    "gate",
    "patch_engine",
    "plugin_manager",
    "sensitivity_methods",
    "tables",
]


def arm() -> None:
    """Register every patch. Called by ``mlx_optiq_ext._activation``."""
    from .commands.table import COMMANDS
    from .engine import status as report
    from .patches import evaluate

    _status.register(report.lines)
    main_module.redirect(COMMANDS)
    evaluate.install()
    patch_engine().apply()


def disarm() -> None:
    """Undo every patch."""
    patch_engine().undo()
