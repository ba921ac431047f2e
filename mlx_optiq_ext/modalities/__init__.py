"""Text models out of vision-language and audio checkpoints."""

from .families import FAMILIES, Family, find, in_tower, is_modal, is_multimodal
from .leftovers import remove_processor_files, tower_tensors
from .loading import Loaded, load_text
from .text import Report, Text, handed_down, to_text

__all__ = [
    "FAMILIES",
    "Family",
    "Loaded",
    "Report",
    "Text",
    "find",
    "handed_down",
    "in_tower",
    "is_modal",
    "is_multimodal",
    "load_text",
    "remove_processor_files",
    "to_text",
    "tower_tensors",
]
