"""The pluggy manager: our hooks first, then whatever is installed under ``mlx_optiq_ext``."""

import os
import sys
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import pluggy

from .errors import OptiqError

PROJECT = "mlx_optiq_ext"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

#: Plugins that could not be loaded: (name, reason). Shown by ``mlx_optiq_ext.status()``.
broken: list[tuple[str, str]] = []


def blocked() -> tuple[str, ...]:
    """Names in ``MLX_OPTIQ_EXT_BLOCK`` (comma separated): plugins and features to leave out."""
    names = os.environ.get("MLX_OPTIQ_EXT_BLOCK", "").split(",")
    return tuple(name.strip() for name in names if name.strip())


def load(specs: Any, builtin: Iterable[tuple[str, Any]]) -> pluggy.PluginManager:
    """Build the manager.

    Args:
        specs: Module or class that holds the hookspecs.
        builtin: ``(name, plugin)`` pairs to register first, so that others win over them.

    Returns:
        A manager with every plugin of the entry-point group ``mlx_optiq_ext`` registered. A plugin
        that fails to import or to validate is left out, noted in `broken` and named on stderr.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(specs)
    if os.environ.get("MLX_OPTIQ_EXT_TRACE") == "1":
        manager.trace.root.setwriter(lambda text: print(text, end="", file=sys.stderr))
        manager.enable_tracing()
    for name in blocked():
        manager.set_blocked(name)
    for name, plugin in builtin:
        if not manager.is_blocked(name):
            manager.register(plugin, name)
    broken.clear()
    for entry_point in metadata.entry_points(group=PROJECT):
        if manager.is_blocked(entry_point.name) or manager.has_plugin(entry_point.name):
            continue
        try:
            plugin = entry_point.load()
            manager.register(plugin, entry_point.name)
            manager.check_pending()
        except Exception as error:
            if manager.has_plugin(entry_point.name):
                manager.unregister(name=entry_point.name)
            reason = f"{type(error).__name__}: {error}"
            broken.append((entry_point.name, reason))
            note = f"mlx_optiq_ext: plugin {entry_point.name!r} left out ({reason})"
            print(note, file=sys.stderr)
    return manager


def answers(
    manager: pluggy.PluginManager,
    hook: str,
    arguments: dict[str, Any],
    refusals: tuple[type[Exception], ...] = (OptiqError,),
) -> list[Any]:
    """Ask every plugin; one that fails does not keep the others from answering.

    Args:
        manager: From `load`.
        hook: Name of a hook that collects every plugin's result.
        arguments: For the hook.
        refusals: Exceptions that a plugin raises on purpose, which go through.

    Returns:
        The results that are not None, that of the plugin registered last first. A plugin that
        raises anything else is named on stderr.
    """
    asked = [impl.plugin for impl in reversed(getattr(manager.hook, hook).get_hookimpls())]
    results: list[Any] = []
    for plugin in asked:
        others = [other for other in asked if other is not plugin]
        try:
            results += manager.subset_hook_caller(hook, others)(**arguments)
        except refusals:
            raise
        except Exception as error:
            name, reason = manager.get_name(plugin), f"{type(error).__name__}: {error}"
            print(f"mlx_optiq_ext: plugin {name!r} failed in {hook} ({reason})", file=sys.stderr)
    return results
