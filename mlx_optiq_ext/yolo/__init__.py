"""YOLO26: per-layer precision for detections, in a file that yolo-mlx loads."""

from .checkpoint import Architecture, Checkpoint, read
from .divergence import Divergence
from .evaluation import Evaluation, detect, evaluate
from .labels import read_labels
from .loading import load
from .pipeline import Result, run_yolo_pipeline
from .planning import Choice, Plan
from .side_by_side import draw

__all__ = [
    "Architecture",
    "Checkpoint",
    "Choice",
    "Divergence",
    "Evaluation",
    "Plan",
    "Result",
    "detect",
    "draw",
    "evaluate",
    "load",
    "read",
    "read_labels",
    "run_yolo_pipeline",
]
