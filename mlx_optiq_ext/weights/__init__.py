"""Weights: candidates, sensitivity, allocation and the plan that mlx-lm then applies."""

from .allocation import allocate
from .calibration import Calibration
from .packing import BITS, GROUP_SIZES, Packing, Size, Tensor, tensors
from .plan import Plan, check_written
from .planning import METHODS, plan_folder, plan_model
from .sensitivity import Problem, Sensitivity

__all__ = [
    "BITS",
    "GROUP_SIZES",
    "METHODS",
    "Calibration",
    "Packing",
    "Plan",
    "Problem",
    "Sensitivity",
    "Size",
    "Tensor",
    "allocate",
    "check_written",
    "plan_folder",
    "plan_model",
    "tensors",
]
