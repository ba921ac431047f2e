"""Loads an output of the pipeline, with any number of classes and their names."""

from pathlib import Path
from typing import Any

from .. import files
from ..errors import InputError
from . import network
from .pipeline import METADATA
from .reading.checkpoint import Architecture, Checkpoint, read
from .reading.torch_file import class_names


def load(path: str | Path) -> Any:
    """A ``yolo26mlx.YOLO`` with these weights; every tensor is checked.

    yolo-mlx itself also loads the ``.npz`` file, if the network has the usual number of classes. It
    ignores unknown tensors and does not notice missing ones.

    Args:
        path: An output folder of ``run_yolo_pipeline``, or any YOLO26 checkpoint.

    Raises:
        InputError: The file is missing, damaged, or not a complete YOLO26.
    """
    path = Path(path)
    names = None
    if path.is_dir():
        record = files.read_json(path / METADATA)
        weights = sorted(path.glob("yolo26*.npz"))
        if not isinstance(record, dict) or len(weights) != 1:
            raise InputError(f"{path} is not an output of --optiq-model-type yolo")
        listed = record.get("names")
        if isinstance(listed, dict) and all(k.isdecimal() and len(k) < 9 for k in listed):
            names = class_names({int(key): name for key, name in listed.items()})
        path = weights[0]
    checkpoint = read(path)
    return assemble(checkpoint, names or checkpoint.names)


def assemble(checkpoint: Checkpoint, names: dict[int, str] | None = None) -> Any:
    """A ``yolo26mlx.YOLO`` of a checkpoint."""
    package = network.library()
    architecture: Architecture = checkpoint.architecture
    wrapper = package.YOLO(task=architecture.task, verbose=False)
    wrapper.model = network.load(checkpoint)
    wrapper.nc, wrapper.stride = architecture.classes, wrapper.model.stride
    wrapper.names = names or wrapper.model.names
    return wrapper
