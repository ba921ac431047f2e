"""YOLO26: per-layer precision for detections, in a file that yolo-mlx loads.

Checkpoints are read, and PyTorch's without running their code, where yolo-mlx is not installed;
`run_yolo_pipeline`, `load`, `evaluate` and `draw` need it::

    from mlx_optiq_ext import yolo

    checkpoint = yolo.read("yolo26n.safetensors")
    print(checkpoint.architecture.name, len(checkpoint.weights))
"""

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
