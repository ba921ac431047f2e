"""Flash decoding over packed keys and values, as kernels of our own."""

from .decode_kernel import attend, supports
from .turn_kernel import turned

__all__ = ["attend", "supports", "turned"]
