"""Versions of this package, MLX and mlx-lm."""

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Versions of this package, mlx and mlx-lm, by their names on PyPI."""
    from importlib import metadata

    names = ("mlx", "mlx-lm")
    return {"mlx-optiq-ext": __version__, **{name: metadata.version(name) for name in names}}
