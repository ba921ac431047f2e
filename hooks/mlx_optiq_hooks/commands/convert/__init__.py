"""``mlx_lm.convert``: quantizes by plan, plans the KV cache, or converts a detector."""

from .checks import check
from .options import Options, add_arguments
from .run import Run, convert, interrupted

__all__ = ["Options", "Run", "add_arguments", "check", "convert", "interrupted"]
