"""LoRA adapters in every form: reading, checking, writing, and ranks that follow precision."""

from .adapter import Adapter, LayerAdapter
from .fitting import fit
from .reading import read_adapter

__all__ = ["Adapter", "LayerAdapter", "fit", "read_adapter"]
