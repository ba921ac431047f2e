"""``mlx_lm.convert``: quantizes by plan, plans the KV cache, or converts a detector."""

from .checks import check
from .options import GROUPS, Options, add_arguments
from .run import Run, convert, interrupted

__all__ = ["GROUPS", "Options", "Run", "add_arguments", "check", "convert", "interrupted"]
