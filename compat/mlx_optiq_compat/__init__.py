"""Knowledge of mlx-lm's releases: which are supported, and which features work on them.

The standard library only, and nothing heavier than this file until a name is used: the import
runs inside ``import mlx_lm``, where most programs never ask. The data are ``matrix.toml`` (the
releases and the features) and ``signatures.json`` (what mlx-lm's functions looked like there).
"""

from __future__ import annotations

TYPE_CHECKING = False  # what typing.TYPE_CHECKING is, without importing typing
if TYPE_CHECKING:
    from .gate import FeatureState, Verdict, feature, verdict
    from .matrix import Feature, Row, features, markdown_table, rows
    from .signature import matching
    from .version import installed_mlx, installed_version

__all__ = [
    "Feature",
    "FeatureState",
    "Row",
    "Verdict",
    "feature",
    "features",
    "installed_mlx",
    "installed_version",
    "markdown_table",
    "matching",
    "rows",
    "verdict",
]

_HOME = {
    "Feature": "matrix",
    "FeatureState": "gate",
    "Row": "matrix",
    "Verdict": "gate",
    "feature": "gate",
    "features": "matrix",
    "installed_mlx": "version",
    "installed_version": "version",
    "matching": "signature",
    "markdown_table": "matrix",
    "rows": "matrix",
    "verdict": "gate",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module on first use (PEP 562).

    Raises:
        AttributeError: The package has no such public name.
    """
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
