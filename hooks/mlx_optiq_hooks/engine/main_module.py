"""``python -m mlx_lm.convert``: upstream's deprecated form.

Python then runs a second copy of the module as ``__main__``, which no import hook sees. When one of
our options is on the command line, or in the YAML file of ``mlx_lm.lora``, the imported module's
``main`` runs instead of that copy.
"""

import sys
from collections.abc import Collection
from pathlib import Path

from . import imports

#: A key of ours in a YAML file, in either spelling.
_KEY = rb"\boptiq[\w-]*['\"]?\s*:"


class _Loader(imports.Loader):
    """The real loader, except for the code that ``runpy`` asks for."""

    def get_code(self, name: str):
        source = f"import importlib\nimportlib.import_module({name!r}).main()\n"
        return compile(source, f"<mlx_optiq_ext: {name}>", "exec")


def requested(argv: list[str], original: list[str], commands: Collection[str]) -> str | None:
    """The command module that ``python -m`` is about to run with our options, if any.

    Args:
        argv: ``sys.argv``, which starts with ``"-m"`` while Python looks for the module.
        original: ``sys.orig_argv``, the interpreter's own options included.
        commands: Names of the stock commands, without ``mlx_lm.``.
    """
    if argv[:1] != ["-m"]:
        return None
    module = original[len(original) - len(argv)]
    if module.startswith("-"):
        module = module.partition("m")[2]  # joined: -mmlx_lm.convert
    package, _, command = module.partition(".")
    if package != "mlx_lm" or command not in commands:
        return None
    asked = any(argument.startswith("--optiq") for argument in argv)
    return module if asked or (command == "lora" and _in_file(argv[1:])) else None


def _in_file(arguments: list[str]) -> bool:
    """Whether the YAML file that ``mlx_lm.lora`` is given names an option of ours."""
    import argparse
    import re

    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("-c", "--config")
    try:
        file = parser.parse_known_args(arguments)[0].config
        return file is not None and bool(re.search(_KEY, Path(file).read_bytes()))
    except (argparse.ArgumentError, OSError, ValueError):
        return False  # mlx-lm reports it


def redirect(commands: Collection[str]) -> None:
    """Let ``python -m mlx_lm.X --optiq-...`` run the patched module."""
    name = requested(sys.argv, sys.orig_argv, commands)
    if name is not None:
        imports.load_with(name, _Loader)
