"""Weights: the precision of each tensor, and how it is rounded.

A plan for a budget in bits per weight, as mlx-lm prints them::

    from pathlib import Path
    from mlx_optiq_ext import weights

    request = weights.Request(budget=4.5, bits=(4, 8), calibration=Path("calibration.txt"))
    print(weights.plan_folder("Qwen/Qwen3-0.6B", request).summary())
"""

from ..model.loading import model_digest
from ..planning.allocation import allocate
from ..planning.budget import Budget
from ..planning.calibration import Calibration
from .candidates import Size, Tensor, tensors
from .pins import Pin
from .pipeline import Conversion, prepare
from .plan import Plan, check_written
from .plan_file import read_plan
from .plan_search import Study, search
from .precision import BITS, GROUP_SIZES, Precision
from .request import EFFORTS, Request
from .rounding.distillation import distill
from .rounding.refinement import refine
from .rounding.stage import Thoroughness
from .sensitivity.method import Method, Need
from .sensitivity.problem import Problem, Sensitivity
from .sensitivity.registry import register as register_method
from .stored import put, ready
from .study import calibrated, plan_folder, plan_model, study_model

__all__ = [
    "BITS",
    "EFFORTS",
    "GROUP_SIZES",
    "Budget",
    "Calibration",
    "Conversion",
    "Method",
    "Need",
    "Pin",
    "Plan",
    "Precision",
    "Problem",
    "Request",
    "Sensitivity",
    "Size",
    "Study",
    "Tensor",
    "Thoroughness",
    "allocate",
    "calibrated",
    "check_written",
    "distill",
    "model_digest",
    "plan_folder",
    "plan_model",
    "prepare",
    "put",
    "read_plan",
    "ready",
    "refine",
    "register_method",
    "search",
    "study_model",
    "tensors",
]
