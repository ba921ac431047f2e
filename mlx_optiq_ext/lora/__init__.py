"""LoRA adapters in every form: reading, checking, writing, and ranks that follow precision."""

from .adapter import Adapter, LayerAdapter
from .averaging import digest, over_all_tokens
from .checkpoint import Checkpoint
from .exchange import convert
from .fitting import fit
from .layers import attach
from .location import readable_by_stock
from .ranks import CONSTANT, SCALINGS, allocate
from .reading import read_adapter
from .table import table
from .training import DEFAULT_SCALING, Request, prepare, summary

__all__ = [
    "CONSTANT",
    "DEFAULT_SCALING",
    "SCALINGS",
    "Adapter",
    "Checkpoint",
    "LayerAdapter",
    "Request",
    "allocate",
    "attach",
    "convert",
    "digest",
    "fit",
    "over_all_tokens",
    "prepare",
    "read_adapter",
    "readable_by_stock",
    "summary",
    "table",
]
