"""Latency: speed and memory of a model on a chip, predicted from config and tensor headers.

Only headers are read, so the model need not fit this machine::

    from mlx_optiq_ext import latency

    layout = latency.read_layout("Qwen/Qwen3-0.6B")
    work = latency.Workload(prompt=512, generated=256)
    prediction = latency.predict(layout, latency.find_chip("m4-max-40"), work)
    print(f"{prediction.decode_tps:.0f} tokens per second")
"""

from ..model.headers import Header, read_headers
from .chips import Chip, detect, find_chip, known_chips, read_chip, write_chip
from .demands import Demand, demand
from .efficiency import FITTED, Efficiency, fit
from .layout import Layout, Operator, layout_of, read_layout
from .measured import Layers, Measured, Products
from .roofline import Prediction, Workload, predict

__all__ = [
    "FITTED",
    "Chip",
    "Demand",
    "Efficiency",
    "Header",
    "Layers",
    "Layout",
    "Measured",
    "Operator",
    "Prediction",
    "Products",
    "Workload",
    "demand",
    "detect",
    "find_chip",
    "fit",
    "known_chips",
    "layout_of",
    "predict",
    "read_chip",
    "read_headers",
    "read_layout",
    "write_chip",
]
