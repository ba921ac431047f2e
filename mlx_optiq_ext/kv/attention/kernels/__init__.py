"""Flash decoding over packed keys and values, as kernels of our own."""

from .decode_kernel import attend, supports

__all__ = ["attend", "supports"]
