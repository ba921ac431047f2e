"""Our lines of ``mlx_optiq_ext.status()``."""

import importlib
from collections.abc import Iterable

from mlx_optiq_ext import plugins

from .gate import FEATURES, State


def lines(load: bool, verbose: bool) -> list[str]:
    """Verdict, features, plugins.

    Args:
        load: Whether to import every patched module first, so that its patches can be checked.
        verbose: Whether to give each feature's reason and each patch.
    """
    from ..installation import gate, patch_engine, plugin_manager

    verdict, patches = gate(), patch_engine()
    failed = patches.load(FEATURES) if load else {}
    broken = _import_error() if load and verdict.version else None
    result = [f"mlx-lm {verdict.version}: {verdict.verdict} ({verdict.reason})"]
    if broken:
        states = dict.fromkeys(verdict.states, State(False, f"mlx-lm does not import: {broken}"))
    else:
        states = {feature: verdict.checked(feature) for feature in verdict.states}
    result += _each(states) if verbose else _grouped(states)
    if not broken:
        result += [f"  {module} does not import: {why}" for module, why in failed.items()]
    if verbose:
        result.append("patches:")
        words = {True: "live", False: "NOT live", None: "waiting for its import"}
        for patch in patches.patches:
            result.append(f"  {patch.target}: {words[patches.live(patch)]} ({patch.why})")
    manager = plugin_manager()
    extra = [line for lines in manager.hook.optiq_status() for line in lines]
    names = [name for name, plugin in manager.list_name_plugin() if plugin is not None]
    result.append(f"plugins: {', '.join(names)}")
    result += [f"  left out: {name} ({reason})" for name, reason in plugins.broken]
    result += [f"  failed: {name} in {hook} ({reason})" for name, hook, reason in plugins.failures]
    return result + [str(line) for line in extra]


def _import_error() -> str | None:
    """Why mlx_lm does not import, or None."""
    try:
        importlib.import_module("mlx_lm")
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _each(states: dict[str, State]) -> Iterable[str]:
    yield "features:"
    for feature, state in states.items():
        yield f"  {feature}: {'on' if state.on else 'off'} ({state.reason})"


def _grouped(states: dict[str, State]) -> Iterable[str]:
    """The features that are on; then each reason with the features that are off for it."""
    on = [name for name, state in states.items() if state.on]
    yield f"features: {', '.join(on) or 'none'}"
    off: dict[str, list[str]] = {}
    for feature, state in states.items():
        if not state.on:
            off.setdefault(state.reason, []).append(feature)
    for reason, names in off.items():
        yield f"  {', '.join(names)}: off ({reason})"
