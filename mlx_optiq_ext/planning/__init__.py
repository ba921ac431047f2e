"""Shared parts of planning: calibration text, divergence, kept measurements, allocation.

One candidate for each tensor, at the least cost within a capacity::

    from mlx_optiq_ext import planning

    costs = [[0.9, 0.1], [0.4, 0.3]]
    sizes = [[4, 8], [4, 8]]
    print(planning.allocate(costs, sizes, capacity=12))
"""

from .allocation import allocate
from .budget import Budget
from .calibration import Calibration, Sampling, load_calibration
from .divergence import Reference
from .journal import Journal
from .kinds import KINDS, Kind
from .texts import read_texts

__all__ = [
    "KINDS",
    "Budget",
    "Calibration",
    "Journal",
    "Kind",
    "Reference",
    "Sampling",
    "allocate",
    "load_calibration",
    "read_texts",
]
