"""Breaks a feature's patches in every way and runs a command with that feature's flag each time.

    python sabotage.py FEATURE COMMAND ARGUMENT...

Prints a JSON list of [what was done, exit status, what stood on standard error].
"""

import contextlib
import dataclasses
import importlib
import io
import json
import sys

import mlx_optiq_ext
import mlx_optiq_hooks
from mlx_optiq_hooks import installation

feature, command, *arguments = sys.argv[1:]
tables = installation.tables
mine = [patch for patch in tables() if patch.feature == feature]


def raising(original):
    raise RuntimeError("broken patch")


def broken():
    """The table, in which the feature's last patch raises when it is applied."""
    wrong = dataclasses.replace(mine[-1], wrapper=None, replace=raising)
    return tuple(wrong if patch == mine[-1] else patch for patch in tables())


def run():
    errors = io.StringIO()
    status = 0
    sys.argv = [f"mlx_lm.{command}", *arguments]
    with contextlib.redirect_stderr(errors):
        try:
            importlib.import_module(f"mlx_lm.{command}").main()
        except SystemExit as end:
            status = end.code
    return status, errors.getvalue()


installation.tables = broken
outcomes = [(mine[-1].target, *run())]  # importing mlx_lm arms
status = mlx_optiq_ext.status(verbose=True)
assert f"  {feature}: off ({feature} needs a patch that failed" in status

mlx_optiq_hooks.disarm()
installation.tables = tables
installation.gate.cache_clear()
installation.patch_engine.cache_clear()
mlx_optiq_hooks.arm()
installation.gate().require(feature)  # mended: what is refused below is for what is done there

for patch in mine:
    module = sys.modules[patch.module]
    *path, name = patch.attribute.split(".")
    parent = module
    for step in path:
        parent = getattr(parent, step)
    before = vars(parent)[name]
    setattr(parent, name, lambda *args, **kwargs: None)
    outcomes.append((patch.target, *run()))
    setattr(parent, name, before)

for name in dict.fromkeys(patch.module for patch in mine):
    module = sys.modules[name]
    before = dict(vars(module))
    importlib.reload(module)
    outcomes.append((name, *run()))
    vars(module).update(before)

print(json.dumps(outcomes))
