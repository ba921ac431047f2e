"""The pluggy manager: our hooks first, then whatever is installed under ``mlx_optiq_ext``."""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Collection, Iterable
from importlib import metadata
from types import ModuleType
from typing import Any, get_type_hints

import pluggy

from .errors import OptiqError, PluginError

PROJECT = "mlx_optiq_ext"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

#: Plugins that could not be loaded: (name, reason). Shown by ``mlx_optiq_ext.status()``.
broken: list[tuple[str, str]] = []

#: Hooks of plugins that failed when called: (name, hook, reason). Shown by ``status()``.
failures: list[tuple[str, str, str]] = []

#: What a plugin raises on purpose: a refusal of input, or an option that exists already.
REFUSALS = (OptiqError, argparse.ArgumentError)

#: What a quantization predicate may return for one module.
_CHOICE = bool | dict | None


def blocked() -> tuple[str, ...]:
    """Names in ``MLX_OPTIQ_EXT_BLOCK`` (comma separated): plugins and features to leave out."""
    names = os.environ.get("MLX_OPTIQ_EXT_BLOCK", "").split(",")
    return tuple(name.strip() for name in names if name.strip())


def load(
    specs: Any, builtin: Iterable[tuple[str, Any]], optional: Collection[str] = ()
) -> pluggy.PluginManager:
    """Build the manager.

    Args:
        specs: Module that holds the hookspecs; a plugin's results must have the annotated types.
        builtin: ``(name, plugin)`` pairs to register first, so that others win over them.
        optional: Hooks whose failure does not end the command.

    Returns:
        A manager with every plugin of the entry-point group ``mlx_optiq_ext`` registered. A plugin
        that fails to import or to validate is left out, noted in `broken` and named on stderr. One
        that fails in a hook is noted in `failures`. The hook then raises PluginError. An optional
        hook instead names the plugin on stderr, once, and asks the others. `REFUSALS` go through.
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
    failures.clear()
    for entry_point in metadata.entry_points(group=PROJECT):
        name = entry_point.name
        if manager.is_blocked(name) or manager.has_plugin(name):
            continue
        try:
            plugin = _guarded(manager, entry_point.load(), name, specs, optional)
            manager.register(plugin, name)
            manager.check_pending()
        except (Exception, SystemExit) as error:
            if manager.has_plugin(name):
                manager.unregister(name=name)
            broken.append((name, _reason(error)))
            print(f"mlx_optiq_ext: plugin {name!r} left out ({_reason(error)})", file=sys.stderr)
    return manager


def installed() -> set[str]:
    """Names of the installed plugins, blocked and broken ones included."""
    return {entry_point.name for entry_point in metadata.entry_points(group=PROJECT)}


def check(hook: str) -> None:
    """Refuse to go on if a plugin failed in a hook.

    Raises:
        PluginError: One did.
    """
    for failure in failures:
        if failure[1] == hook:
            raise _refusal(*failure)


def _guarded(
    manager: pluggy.PluginManager, plugin: Any, name: str, specs: Any, optional: Collection[str]
) -> ModuleType:
    """A plugin with the same hookimpls, whose failures name it.

    Raises:
        TypeError: It has a hook wrapper, which cannot fail without the hooks that it wraps.
    """
    result = ModuleType(name)
    for attribute in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, attribute)
        if options is None:
            continue
        if options.get("wrapper") or options.get("hookwrapper"):
            raise TypeError(f"{attribute} is a hook wrapper: return a result of its own instead")
        hook = options.get("specname") or attribute
        declared = getattr(specs, hook, None)
        expected = get_type_hints(declared).get("return", object) if declared else object
        guard = functools.partial(_guard, name=name, hook=hook, optional=hook in optional)
        function = guard(getattr(plugin, attribute), expected=expected)
        if hook == "optiq_quant_predicate":
            function = _guard_predicate(function, guard)
        setattr(result, attribute, function)
    return result


def _guard(
    function: Callable[..., Any], *, name: str, hook: str, expected: Any, optional: bool
) -> Callable[..., Any]:
    # A status refuses nothing.
    refusals = () if hook == "optiq_status" else REFUSALS

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            result = function(*args, **kwargs)
            if not isinstance(result, expected):
                raise TypeError(f"it returned {result!r:.80}, not {_words(expected)}")
        except refusals:
            raise
        except (Exception, SystemExit) as error:
            failure = (name, hook, _reason(error))
            new = failure not in failures
            if new:
                failures.append(failure)
            if not optional:
                raise _refusal(*failure) from error
            if new:
                print(f"mlx_optiq_ext: {_told(*failure)}", file=sys.stderr)
            return None
        return result

    return guarded


def _guard_predicate(hookimpl: Callable[..., Any], guard: Callable[..., Any]) -> Callable[..., Any]:
    """A hookimpl whose answer is guarded too: it is called once for each module."""

    @functools.wraps(hookimpl)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        predicate = hookimpl(*args, **kwargs)
        return None if predicate is None else guard(predicate, expected=_CHOICE)

    return guarded


def _told(name: str, hook: str, reason: str) -> str:
    return f"plugin {name!r} failed in {hook} ({reason})"


def _refusal(name: str, hook: str, reason: str) -> PluginError:
    return PluginError(
        f"{_told(name, hook, reason)}: correct it, or set MLX_OPTIQ_EXT_BLOCK={name} to run "
        "without it"
    )


def _words(expected: Any) -> str:
    return getattr(expected, "__name__", None) or str(expected).replace("collections.abc.", "")


def _reason(error: BaseException) -> str:
    """The kind of an error and what it says, on one line."""
    return ": ".join(filter(None, [type(error).__name__, " ".join(str(error).split())]))
