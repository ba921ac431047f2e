"""``python -m mlx_lm.convert``: upstream's deprecated form.

Python then runs a second copy of the module as ``__main__``, which no import hook sees. When one of
our options is on the command line, run the imported module's ``main`` instead of that copy.
"""

import importlib.util
import sys
from typing import Any

from .flags import COMMANDS


class _Loader:
    """The real loader, except for the code that ``runpy`` asks for."""

    def __init__(self, real: Any):
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_code(self, name: str):
        source = f"import importlib\nimportlib.import_module({name!r}).main()\n"
        return compile(source, f"<mlx_optiq_ext: {name}>", "exec")


class _Finder:
    """Hands out the real spec of one module with the loader above."""

    def __init__(self, name: str):
        self.name = name
        self._busy = False

    def find_spec(self, name: str, path=None, target=None):
        if name != self.name or self._busy:
            return None
        self._busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._busy = False
        if spec is not None:
            spec.loader = _Loader(spec.loader)  # pyright: ignore[reportAttributeAccessIssue]
        return spec


def requested(argv: list[str], original: list[str]) -> str | None:
    """The command module that ``python -m`` is about to run with our options, if any.

    Args:
        argv: ``sys.argv``, which starts with ``"-m"`` while Python looks for the module.
        original: ``sys.orig_argv``, the interpreter's own options included.
    """
    if argv[:1] != ["-m"] or not any(argument.startswith("--optiq") for argument in argv):
        return None
    module = original[len(original) - len(argv)]
    if module.startswith("-"):
        module = module.partition("m")[2]  # joined: -mmlx_lm.convert
    package, _, command = module.partition(".")
    return module if package == "mlx_lm" and command in COMMANDS else None


def redirect() -> None:
    """Let ``python -m mlx_lm.X --optiq-...`` run the patched module."""
    name = requested(sys.argv, sys.orig_argv)
    if name is not None:
        sys.meta_path.insert(0, _Finder(name))  # pyright: ignore[reportArgumentType]
