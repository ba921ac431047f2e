"""LoRA adapters in every form: reading, checking, writing, and ranks that follow precision.

The layers of an adapter in mlx-lm's or PEFT's form::

    from mlx_optiq_ext import lora

    adapter = lora.read_adapter("adapters/sql")
    print(lora.table(adapter))
"""

from .adapter import Adapter, LayerAdapter
from .averaging import over_all_tokens
from .choice import choose_ranks
from .data import check_same_start, check_trained_tokens, samples
from .fitting import adaptable, fit
from .forms.checkpoint import Checkpoint
from .forms.exchange import convert
from .forms.location import folder_of as adapter_folder
from .forms.location import readable_by_stock
from .forms.reading import read_adapter
from .layers import attach
from .listing import table
from .rank_scaling import CONSTANT, SCALINGS, allocate
from .resuming import check_stock_training
from .training import DEFAULT_SCALING, Request, check_parameters, prepare, summary

__all__ = [
    "CONSTANT",
    "DEFAULT_SCALING",
    "SCALINGS",
    "Adapter",
    "Checkpoint",
    "LayerAdapter",
    "Request",
    "adaptable",
    "adapter_folder",
    "allocate",
    "attach",
    "check_parameters",
    "check_same_start",
    "check_stock_training",
    "check_trained_tokens",
    "choose_ranks",
    "convert",
    "fit",
    "over_all_tokens",
    "prepare",
    "read_adapter",
    "readable_by_stock",
    "samples",
    "summary",
    "table",
]
