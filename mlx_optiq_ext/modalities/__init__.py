"""Text models out of vision-language and audio checkpoints.

A checkpoint that is a text model already is loaded as mlx-lm does::

    import mlx_lm
    from mlx_optiq_ext import modalities

    loaded = modalities.load_text(mlx_lm.load, "Qwen/Qwen3-0.6B")
    print(loaded.report.summary() if loaded.report else "nothing was left out")
"""

from ..model.config import in_tower
from .families import FAMILIES, Family, find, is_modal, is_multimodal
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
