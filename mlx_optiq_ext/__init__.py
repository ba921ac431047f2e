"""Per-layer precision for the stock mlx-lm commands.

Importing this package activates it; see README.md for what that means and how to switch it off.
"""

from . import _activation

_activation.install("import")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from . import adapters, evaluation, latency, lora, modalities, weights, yolo
    from ._status import status
    from ._version import __version__
    from .errors import OptiqError
    from .plugins import hookimpl, hookspec

# Loaded on first use: this package is imported at every interpreter start.
_PUBLIC = {
    "OptiqError": "errors",
    "evaluation": "evaluation",
    "hookimpl": "plugins",
    "hookspec": "plugins",
    "latency": "latency",
    "adapters": "adapters",
    "lora": "lora",
    "modalities": "modalities",
    "status": "_status",
    "weights": "weights",
    "yolo": "yolo",
    "__version__": "_version",
}

__all__ = [
    "OptiqError",
    "__version__",
    "adapters",
    "evaluation",
    "hookimpl",
    "hookspec",
    "latency",
    "lora",
    "modalities",
    "status",
    "weights",
    "yolo",
]


def __getattr__(name: str):
    """Resolve a public name lazily (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module = importlib.import_module(f"{__name__}.{_PUBLIC[name]}")
    value = module if _PUBLIC[name] == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
