"""YOLO26: per-layer precision for detections, in a file that yolo-mlx loads."""

from .detection.comparison import Evaluation, detect, evaluate
from .detection.labels import read_labels
from .detection.side_by_side import draw
from .divergence import Divergence
from .loading import load
from .pipeline import Result, run_yolo_pipeline
from .reading.checkpoint import Architecture, Checkpoint, read
from .steps import Choice, DetectionPlan

__all__ = [
    "Architecture",
    "Checkpoint",
    "Choice",
    "DetectionPlan",
    "Divergence",
    "Evaluation",
    "Result",
    "detect",
    "draw",
    "evaluate",
    "load",
    "read",
    "read_labels",
    "run_yolo_pipeline",
]
