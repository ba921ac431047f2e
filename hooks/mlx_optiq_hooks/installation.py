"""What is active in this process: the patches, the verdict on mlx-lm, the plugins."""

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any

import pluggy

from mlx_optiq_ext import plugins
from mlx_optiq_ext._status import note
from mlx_optiq_ext.errors import OptiqError

from .engine.gate import FEATURES, Gate
from .engine.patch import Engine, Patch


def tables() -> tuple[Patch, ...]:
    """Every patch, from one table per target module."""
    from .commands.table import COMMANDS
    from .engine import flags
    from .patches import convert, generate, lora, perplexity, utils
    from .patches.models import base, cache
    from .patches.server import (
        adapters as server_adapters,
    )
    from .patches.server import (
        distributed as server_ranks,
    )
    from .patches.server import (
        generation as server_generation,
    )
    from .patches.server import (
        guard as server_guard,
    )
    from .patches.server import (
        model as server,
    )
    from .patches.server import (
        prompts as server_prompts,
    )
    from .patches.tuner import trainer
    from .patches.tuner import utils as tuner_utils

    return (
        *(patch for name, command in COMMANDS.items() for patch in flags.patches(name, command)),
        *convert.PATCHES,
        *utils.PATCHES,
        *base.PATCHES,
        *cache.PATCHES,
        *generate.PATCHES,
        *server.PATCHES,
        *server_adapters.PATCHES,
        *server_prompts.PATCHES,
        *server_ranks.PATCHES,
        *server_generation.PATCHES,
        *server_guard.PATCHES,
        *perplexity.PATCHES,
        *tuner_utils.PATCHES,
        *lora.PATCHES,
        *trainer.PATCHES,
    )


@functools.cache
def gate() -> Gate:
    """Which features are on for the installed mlx-lm."""
    return Gate.for_installed(tables(), patch_engine)


@functools.cache
def patch_engine() -> Engine:
    """The engine with the patches of the features that the installed mlx-lm supports."""
    return Engine(tuple(patch for patch in tables() if gate().states[patch.feature].on))


@functools.cache
def plugin_manager() -> pluggy.PluginManager:
    """The plugin manager, loaded when a command or a hook first needs it."""
    from . import builtin
    from .engine import spec

    manager = plugins.load(spec, [("optiq", builtin)], spec.OPTIONAL)
    known = {*FEATURES, "optiq", *plugins.installed()}
    if unknown := [name for name in plugins.blocked() if name not in known]:
        note(
            f"MLX_OPTIQ_EXT_BLOCK names no feature and no installed plugin with "
            f"{', '.join(map(repr, unknown))}; features are {', '.join(FEATURES)}"
        )
    return manager


def option_names() -> dict[str, list[str]]:
    """Command -> the names of our options and of the plugins'."""
    from .commands.table import COMMANDS

    found = {}
    for command in COMMANDS:
        parser = argparse.ArgumentParser(add_help=False)
        group = parser.add_argument_group()
        plugin_manager().hook.optiq_add_arguments(command=command, group=group)
        found[command] = [name for each in parser._actions for name in each.option_strings]
    return found


@functools.cache
def register_kv_formats() -> None:
    """Let KV plans and saved prompt caches name the plugins' formats."""
    from mlx_optiq_ext.kv import formats

    for offered in reversed(plugin_manager().hook.optiq_kv_formats()):
        for format in offered:
            formats.register(format)


@functools.cache
def attention_backends() -> tuple[Callable[..., Any], ...]:
    """The plugins' functions; the plugin registered last comes first."""
    found = plugin_manager().hook.optiq_attention_backends()
    return tuple(backend for backends in found for backend in backends)


@functools.cache
def sensitivity_methods() -> tuple[str, ...]:
    """The choices of ``--optiq-sensitivity``: ours and the plugins', who may replace ours."""
    from mlx_optiq_ext.weights.sensitivity import registry

    for offered in reversed(plugin_manager().hook.optiq_sensitivity_methods()):
        for method in offered:
            try:
                registry.register(method)
            except OptiqError as error:
                print(f"mlx_optiq_ext: left out: {error}", file=sys.stderr)
    return registry.names()
