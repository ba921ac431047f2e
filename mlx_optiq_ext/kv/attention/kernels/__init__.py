"""Flash decoding over packed keys and values, as kernels of our own."""

from .launch import attend, supports

__all__ = ["attend", "supports"]
