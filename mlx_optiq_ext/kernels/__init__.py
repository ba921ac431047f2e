"""What every kernel of our own is built with: the platform, its language, and its source text."""

from .platform import CPU, Platform, current, detected
from .source import PLACES, TYPES, header, name_of, text

__all__ = ["CPU", "PLACES", "TYPES", "Platform", "current", "detected", "header", "name_of", "text"]
