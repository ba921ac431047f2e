"""Per-layer precision for the stock mlx-lm commands.

Importing this package activates it; see README.md for what that means and how to switch it off.
Each capability is a module of its own, loaded when it is first asked for::

    import mlx_optiq_ext

    plan = mlx_optiq_ext.kv.parse_spec("k8v4")
    print(mlx_optiq_ext.status())
"""

from . import _activation

_activation.install("import")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from . import (
        adapters,
        distributed,
        evaluation,
        kv,
        latency,
        lora,
        modalities,
        model,
        planning,
        prompts,
        serving,
        turboquant,
        weights,
        yolo,
    )
    from ._status import status
    from ._version import __version__
    from .errors import OptiqError
    from .plugins import hookimpl, hookspec

__all__ = [
    "OptiqError",
    "__version__",
    "adapters",
    "distributed",
    "evaluation",
    "hookimpl",
    "hookspec",
    "kv",
    "latency",
    "lora",
    "modalities",
    "model",
    "planning",
    "prompts",
    "serving",
    "status",
    "turboquant",
    "weights",
    "yolo",
]

# Where the names are that are no module. All load on first use: this package is imported at every
# interpreter start.
_HOMES = {
    "OptiqError": "errors",
    "__version__": "_version",
    "hookimpl": "plugins",
    "hookspec": "plugins",
    "status": "_status",
}


def __getattr__(name: str):
    """Resolve a public name lazily (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module = importlib.import_module(f"{__name__}.{_HOMES.get(name, name)}")
    value = getattr(module, name) if name in _HOMES else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
