"""Weights: candidates, sensitivity, allocation, refinement, and the plan for mlx-lm to apply."""

from .allocation import allocate
from .calibration import Calibration
from .conversion import Conversion, Request, prepare, put
from .distillation import distill
from .journal import model_digest
from .packing import BITS, GROUP_SIZES, Packing, Size, Tensor, tensors
from .plan import Plan, check_written
from .plan_file import read_plan
from .planning import METHODS, local_folder, plan_folder, plan_model, study_model
from .refinement import refine
from .search import Study, search
from .sensitivity import Problem, Sensitivity

__all__ = [
    "BITS",
    "GROUP_SIZES",
    "METHODS",
    "Calibration",
    "Conversion",
    "Packing",
    "Plan",
    "Problem",
    "Request",
    "Sensitivity",
    "Size",
    "Study",
    "Tensor",
    "allocate",
    "check_written",
    "distill",
    "local_folder",
    "model_digest",
    "plan_folder",
    "plan_model",
    "prepare",
    "put",
    "read_plan",
    "refine",
    "search",
    "study_model",
    "tensors",
]
