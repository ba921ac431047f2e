"""Shared parts of our own kernels: the platform, its language, and source text."""

from .platform import CPU, Platform, current, detected
from .source import PLACES, TYPES, header, name_of, text

__all__ = ["CPU", "PLACES", "TYPES", "Platform", "current", "detected", "header", "name_of", "text"]
