"""The edge to mlx-lm: flags, patches and the plugin hooks. Everything here is thin."""

import functools
from typing import Any

import pluggy

from mlx_optiq_ext import _status, plugins

from . import main_module
from .gate import Gate
from .patch import Engine, Patch


def tables() -> tuple[Patch, ...]:
    """Every patch, from one table per target module."""
    from . import (
        base,
        cache,
        convert,
        flags,
        generate,
        lora,
        perplexity,
        server,
        server_adapters,
        server_ranks,
        trainer,
        tuner_utils,
        utils,
    )

    return (
        *flags.PATCHES,
        *convert.PATCHES,
        *utils.PATCHES,
        *base.PATCHES,
        *cache.PATCHES,
        *generate.PATCHES,
        *server.PATCHES,
        *server_adapters.PATCHES,
        *server_ranks.PATCHES,
        *perplexity.PATCHES,
        *tuner_utils.PATCHES,
        *lora.PATCHES,
        *trainer.PATCHES,
    )


@functools.cache
def gate() -> Gate:
    """Which features are on for the installed mlx-lm."""
    return Gate.for_installed(tables())


@functools.cache
def engine() -> Engine:
    """The engine over the patches of the features that are on."""
    return Engine(tuple(patch for patch in tables() if gate().state(patch.feature).on))


@functools.cache
def plugin_manager() -> pluggy.PluginManager:
    """The plugin manager, loaded when a command or a hook first needs it."""
    from . import builtin, spec

    return plugins.load(spec, [("optiq", builtin)])


def sensitivity_methods() -> dict[str, Any]:
    """Every method of ``--optiq-sensitivity``: ours and the plugins', who may replace ours."""
    methods: dict[str, Any] = {}
    for offered in reversed(plugin_manager().hook.optiq_sensitivity_methods()):
        methods.update(offered)
    return methods


def arm() -> None:
    """Register every patch. Called by ``mlx_optiq_ext._activation``."""
    from . import lm_eval, report

    _status.register(report.lines, report.load)
    main_module.redirect()
    lm_eval.install()
    engine().apply()


def disarm() -> None:
    """Undo every patch."""
    engine().undo()
