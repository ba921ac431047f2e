"""LoRA adapters in every form: reading, checking, writing, and ranks that follow precision."""

from .adapter import Adapter, LayerAdapter
from .checkpoint import Checkpoint
from .exchange import convert
from .fitting import fit
from .layers import attach
from .location import readable_by_stock
from .ranks import SCALINGS, allocate
from .reading import read_adapter
from .table import table
from .training import Request, prepare, summary

__all__ = [
    "SCALINGS",
    "Adapter",
    "Checkpoint",
    "LayerAdapter",
    "Request",
    "allocate",
    "attach",
    "convert",
    "fit",
    "prepare",
    "read_adapter",
    "readable_by_stock",
    "summary",
    "table",
]
