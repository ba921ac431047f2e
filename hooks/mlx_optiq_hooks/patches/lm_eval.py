"""Imports ``mlx_lm.evaluate`` without lm-eval, which that module needs and our tasks may not.

Only while that module is imported, and only for a command line with ``--optiq-task``, small
stand-ins take lm-eval's place; afterwards the real one can be imported if it is installed.
"""

import contextlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

TARGET = "mlx_lm.evaluate"


def requested(argv: Sequence[str]) -> bool:
    """Whether a command line asks for one of our tasks."""
    return any(argument.partition("=")[0] == "--optiq-task" for argument in argv)


def install() -> None:
    """Watch for the import of ``mlx_lm.evaluate``."""
    if requested(sys.argv) and TARGET not in sys.modules:
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Hands out the real spec of the module with a loader that puts the stand-ins up."""

    _busy = False

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != TARGET or self._busy:
            return None
        self._busy = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._busy = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The real loader, with the stand-ins up while it runs the module."""

    def __init__(self, real: Any):
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def create_module(self, spec: Any) -> Any:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        with stand_ins():
            self._real.exec_module(module)


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """What ``mlx_lm.evaluate`` names of lm-eval at its top, in any supported release."""
    made: dict[str, Any] = {
        name: ModuleType(name)
        for name in (
            "lm_eval",
            "lm_eval.api",
            "lm_eval.api.model",
            "lm_eval.api.registry",
            "lm_eval.models",
            "lm_eval.models.huggingface",
        )
    }
    made["lm_eval.api.model"].LM = object
    made["lm_eval.api.registry"].register_model = lambda *names: lambda cls: cls
    made["lm_eval.models.huggingface"].HFLM = type("HFLM", (), {"tokenizer_name": None})
    made["lm_eval.models"].huggingface = made["lm_eval.models.huggingface"]
    # A name that is there as None is one that must not be imported; it stays so.
    before = {name: sys.modules[name] for name in made if name in sys.modules}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            sys.modules.pop(name, None)
        sys.modules.update(before)
