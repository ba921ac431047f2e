"""Attention over packed keys and values."""

from .dispatch import attend

__all__ = ["attend"]
