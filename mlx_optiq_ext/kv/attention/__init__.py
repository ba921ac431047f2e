"""Attention over packed keys and values."""

from .dispatch import attention, backend

__all__ = ["attention", "backend"]
