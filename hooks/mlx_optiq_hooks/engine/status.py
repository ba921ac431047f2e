"""Our lines of ``mlx_optiq_ext.status()``."""

from mlx_optiq_ext import plugins

from .gate import FEATURES


def load() -> None:
    """Import every patched module that imports here, so that its patches can be proved live."""
    from ..installation import patch_engine

    patch_engine().load(FEATURES)


def lines() -> list[str]:
    """Verdict, features, patches and plugins."""
    from ..installation import gate, patch_engine, plugin_manager

    verdict, patches = gate(), patch_engine()
    result = [f"mlx-lm {verdict.version}: {verdict.verdict} ({verdict.reason})", "features:"]
    for feature in verdict.states:
        state = verdict.checked(feature)
        result.append(f"  {feature}: {'on' if state.on else 'off'} ({state.reason})")
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
