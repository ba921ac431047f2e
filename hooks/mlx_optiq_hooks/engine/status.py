"""Our lines of ``mlx_optiq_ext.status()``."""

import contextlib
import importlib

from mlx_optiq_ext import plugins


def load() -> None:
    """Import every patched module that imports here, so that its patches can be proved live."""
    from ..installation import patch_engine

    for module in dict.fromkeys(patch.module for patch in patch_engine().patches):
        # mlx_lm.evaluate needs the lm-eval package, which few have.
        with contextlib.suppress(ImportError):
            importlib.import_module(module)


def lines() -> list[str]:
    """Verdict, features, patches and plugins."""
    from ..installation import gate, patch_engine, plugin_manager

    verdict, patches = gate(), patch_engine()
    result = [f"mlx-lm {verdict.version}: {verdict.verdict} ({verdict.reason})", "features:"]
    for feature, state in verdict.states.items():
        failure = patches.failures.get(feature)
        word = "on" if state.on and failure is None else "off"
        result.append(f"  {feature}: {word} ({failure or state.reason})")
    result.append("patches:")
    words = {True: "live", False: "NOT live", None: "waiting for its import"}
    for patch in patches.patches:
        result.append(f"  {patch.target}: {words[patches.live(patch)]} ({patch.why})")
    manager = plugin_manager()
    names = [name for name, plugin in manager.list_name_plugin() if plugin is not None]
    result.append(f"plugins: {', '.join(names)}")
    result.extend(f"  left out: {name} ({reason})" for name, reason in plugins.broken)
    for extra in plugins.answers(manager, "optiq_status", {}):
        result.extend(extra)
    return result
