"""Patches as data, and the engine that applies and undoes them from one table."""

import functools
import importlib
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import wrapt

Wrapper = Callable[[Any, Any, tuple, dict], Any]


@dataclass(frozen=True)
class Patch:
    """One changed attribute of mlx-lm.

    Attributes:
        target: ``"module:attribute"``, the attribute dotted inside a class.
        feature: The capability it belongs to; a feature's patches apply all or none.
        why: One line for the reader of ``status()``.
        upstream: The issue or PR that would make it unnecessary, or ``"none: <reason>"``.
        wrapper: ``(wrapped, instance, args, kwargs)``, for a function or method.
        replace: Maps the original to its replacement, for a target that is not called.
        uses: Other names of mlx-lm, private or undocumented, that the patch or the library behind
            it relies on, as `mlx_optiq_compat.source` records them for each release.
    """

    target: str
    feature: str
    why: str
    upstream: str
    wrapper: Wrapper | None = None
    replace: Callable[[Any], Any] | None = None
    uses: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """The target's module."""
        return self.target.partition(":")[0]

    @property
    def attribute(self) -> str:
        """The target's attribute, dotted inside a class."""
        return self.target.partition(":")[2]


def of(module: str, *names: str) -> tuple[str, ...]:
    """Names of one module, for ``Patch.uses``."""
    return tuple(f"{module}:{name}" for name in names)


@dataclass
class _Applied:
    patch: Patch
    parent: Any
    name: str
    original: Any
    stand_in: Any
    own: bool
    rebound: list[tuple[ModuleType, str]]
    switch: dict[str, bool]


@dataclass
class Engine:
    """Applies a table of patches as their modules are imported.

    Attributes:
        failures: Feature -> reason, for features whose patches could not be applied.
    """

    patches: tuple[Patch, ...]
    failures: dict[str, str] = field(default_factory=dict)
    _applied: dict[tuple[str, str], _Applied] = field(default_factory=dict)
    _watched: set[str] = field(default_factory=set)
    _enabled: bool = False
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def apply(self) -> None:
        """Patch the modules that are loaded and watch for the others. Idempotent."""
        self._enabled = True
        for module in dict.fromkeys(patch.module for patch in self.patches):
            if module in self._watched:
                if module in sys.modules:
                    self._on_import(sys.modules[module])
                continue
            self._watched.add(module)
            # The hook runs at once if the module is loaded already.
            wrapt.register_post_import_hook(self._on_import, module)

    def undo(self) -> None:
        """Restore every original whose replacement is still in place, and disable the others."""
        with self._lock:
            self._enabled = False
            self._undo(list(self._applied.values()))

    def live(self, patch: Patch) -> bool | None:
        """Whether callers reach our replacement; None while the target's module is not loaded."""
        module = sys.modules.get(patch.module)
        if module is None:
            return None
        applied = self._applied.get((patch.feature, patch.target))
        if applied is None or _aliases(applied.original):
            return False
        try:
            # Looked up again: a reload replaces the patched classes.
            parent = _parent(module, patch)
        except AttributeError:
            return False
        names = [(parent, applied.name)]
        if parent is module and patch.wrapper is not None:
            names += _importers(patch.module, applied.name)
        return all(_leads_to(vars(p).get(name), applied.stand_in) for p, name in names)

    def problem(self, feature: str) -> str | None:
        """Why a feature's patches do not all work, in one sentence; None if they do.

        Patches whose modules are not loaded do not count: see `load`.
        """
        if feature in self.failures:
            return (
                f"{feature} needs a patch that failed ({self.failures[feature]}): install a "
                "release of mlx-lm from the compat table"
            )
        for patch in self.patches:
            if patch.feature == feature and self.live(patch) is False:
                return (
                    f"{feature} needs a patch that is gone ({patch.target}): {patch.module} was "
                    "reloaded, or another tool put its own in its place: start anew without that"
                )
        return None

    def load(self, features: Iterable[str]) -> dict[str, str]:
        """Import the modules that features patch, as far as they import here.

        Returns:
            Module -> why it does not import. mlx_lm.evaluate, for one, needs the lm-eval package.
        """
        wanted, failed = set(features), {}
        for module in dict.fromkeys(p.module for p in self.patches if p.feature in wanted):
            try:
                importlib.import_module(module)
            # An unsuitable MLX shows as an AttributeError somewhere in mlx-lm.
            except (Exception, SystemExit) as error:
                failed[module] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return failed

    def _on_import(self, module: ModuleType) -> None:
        # An error here must not break the running import.
        with self._lock:
            if not self._enabled:
                return
            for patch in self.patches:
                if patch.module != module.__name__ or patch.feature in self.failures:
                    continue
                if (patch.feature, patch.target) in self._applied:
                    continue
                try:
                    self._apply(patch, module)
                except Exception as error:  # named in status(), and refused by the gate
                    self._fail(patch.feature, f"{patch.target}: {type(error).__name__}: {error}")

    def _apply(self, patch: Patch, module: ModuleType) -> None:
        parent, name = _parent(module, patch), patch.attribute.rpartition(".")[2]
        own = name in vars(parent)
        # vars() keeps staticmethod and classmethod objects, which wrapt needs for correct binding.
        original = vars(parent)[name] if own else getattr(parent, name)
        switch = {"on": True}
        if patch.replace is not None:
            stand_in = patch.replace(original)
        else:
            assert patch.wrapper is not None, f"{patch.target} has neither wrapper nor replace"
            stand_in = wrapt.FunctionWrapper(original, patch.wrapper, enabled=lambda: switch["on"])
        setattr(parent, name, stand_in)
        rebound = _aliases(original) if parent is module and patch.wrapper is not None else []
        for holder, alias in rebound:
            setattr(holder, alias, stand_in)
        self._applied[patch.feature, patch.target] = _Applied(
            patch, parent, name, original, stand_in, own, rebound, switch
        )

    def _fail(self, feature: str, reason: str) -> None:
        self.failures[feature] = reason
        self._undo([a for a in self._applied.values() if a.patch.feature == feature])

    def _undo(self, entries: Iterable[_Applied]) -> None:
        # Features may wrap the same attribute; the one on top goes first.
        for entry in reversed(list(entries)):
            entry.switch["on"] = False
            # Another tool may have wrapped ours: its wrapper stays, ours below it is disabled.
            if vars(entry.parent).get(entry.name) is entry.stand_in:
                if entry.own:
                    setattr(entry.parent, entry.name, entry.original)
                else:
                    delattr(entry.parent, entry.name)
            for holder, alias in entry.rebound + _aliases(entry.stand_in):
                if vars(holder).get(alias) is entry.stand_in:
                    setattr(holder, alias, entry.original)
            for other in self._applied.values():
                if other.original is entry.stand_in:
                    other.original, other.own = entry.original, entry.own
            del self._applied[entry.patch.feature, entry.patch.target]


def _parent(module: ModuleType, patch: Patch) -> Any:
    """The module or class that holds a patch's attribute."""
    parent: Any = module
    for step in patch.attribute.split(".")[:-1]:
        parent = getattr(parent, step)
    return parent


def _aliases(value: Any) -> list[tuple[ModuleType, str]]:
    """Names in loaded mlx_lm modules that are bound to ``value`` (``from .x import name``)."""
    if isinstance(value, ModuleType):
        return []
    return [
        (module, name)
        for module_name, module in list(sys.modules.items())
        if module is not None and (module_name == "mlx_lm" or module_name.startswith("mlx_lm."))
        for name, bound in list(vars(module).items())
        if bound is value
    ]


def _leads_to(value: Any, stand_in: Any) -> bool:
    """Whether a value is our replacement, possibly below another tool's wrapper."""
    while value is not None and value is not stand_in:
        value = getattr(value, "__wrapped__", None)
    return value is not None


def _importers(module: str, name: str) -> list[tuple[ModuleType, str]]:
    """Loaded mlx_lm modules that import a name at their top level, and what they call it."""
    return [
        (holder, alias)
        for holder_name, holder in list(sys.modules.items())
        if holder is not None and holder_name.startswith("mlx_lm.")
        for source, taken, alias in _taken(holder_name, getattr(holder, "__file__", None))
        if (source, taken) == (module, name) and alias in vars(holder)
    ]


@functools.lru_cache(maxsize=256)
def _taken(name: str, path: str | None) -> tuple[tuple[str, str, str], ...]:
    """The ``from .x import y as z`` of a module's top level: module, name, alias."""
    import ast

    try:
        with open(path or "", encoding="utf-8") as stream:  # noqa: PTH123 - no pathlib at start-up
            tree = ast.parse(stream.read())
    except (OSError, ValueError, SyntaxError):
        return ()
    inside = str(path).endswith("__init__.py")
    package = [*name.split("."), "__init__"] if inside else name.split(".")
    return tuple(
        (
            ".".join([*package[: -node.level], *filter(None, [node.module])]),
            n.name,
            n.asname or n.name,
        )
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level
        for n in node.names
    )


def bind(wrapped: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments of a call by name: positions have moved between mlx-lm releases."""
    bound = _signature(wrapped).bind(*args, **kwargs)
    named = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named


@functools.lru_cache(maxsize=256)
def _signature(wrapped: Any) -> Any:
    import inspect

    return inspect.signature(wrapped)
