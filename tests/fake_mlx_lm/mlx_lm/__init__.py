"""A stand-in for mlx-lm: the same names, none of the work, and no MLX."""

from ._version import __version__
from .convert import convert

__all__ = ["__version__", "convert"]
