"""Changes how a module is loaded, for changes that must come before its import."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


class Loader(importlib.abc.Loader):
    """The real loader of a module; subclasses change a part of it."""

    def __init__(self, real: Any):
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def create_module(self, spec: Any) -> Any:
        """Call the real loader."""
        return self._real.create_module(spec)

    def exec_module(self, module: Any) -> None:
        """Call the real loader."""
        self._real.exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module, and replaces the loader in its spec by ours."""

    def __init__(self, module: str, loader: Callable[[Any], Loader]):
        self._module = module
        self._loader = loader
        self._busy = False

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self._module or self._busy:
            return None
        self._busy = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._busy = False
        if spec is not None and spec.loader is not None:
            spec.loader = self._loader(spec.loader)
        return spec


def load_with(module: str, loader: Callable[[Any], Loader]) -> None:
    """Wrap a module's loader when it is imported; ``loader`` takes the real one."""
    if module not in sys.modules:
        sys.meta_path.insert(0, _Finder(module, loader))
