"""Reads YOLO26 weights from ``.pt``, ``.safetensors`` or ``.npz`` and identifies the network."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mlx.core as mx

from ... import files
from ...errors import InputError
from . import numpy_file, torch_file
from .naming import canonical

Task = Literal["detect", "segment", "pose"]

#: Channels of the stem -> scale; ``m`` and ``l`` differ in depth only.
STEMS = {16: "n", 32: "s", 64: "m", 96: "x"}

SUFFIXES = {"detect": "", "segment": "-seg", "pose": "-pose"}


@dataclass(frozen=True)
class Architecture:
    """The kind of a YOLO26.

    Attributes:
        task: The task: detection, segmentation or pose.
        scale: ``n``, ``s``, ``m``, ``l`` or ``x``.
        classes: Number of classes.
    """

    task: Task
    scale: str
    classes: int

    @property
    def name(self) -> str:
        """The stem of the file name, from which yolo-mlx reads scale and task."""
        return f"yolo26{self.scale}{SUFFIXES[self.task]}"


@dataclass(frozen=True)
class Checkpoint:
    """Weights as read from a file.

    Attributes:
        weights: Tensors by the file's own names.
        names: Class index -> name, if the file says.
        architecture: The network they belong to.
    """

    weights: dict[str, mx.array]
    names: dict[int, str] | None
    architecture: Architecture


def read(source: str | Path) -> Checkpoint:
    """Read a checkpoint of YOLO26.

    Args:
        source: A ``.pt``, ``.safetensors`` or ``.npz`` file.

    Raises:
        InputError: The file is missing, truncated, of another kind, or asks for code to be run.
    """
    path = Path(source)
    if not path.is_file():
        raise InputError(f"{path} is not a file: give a YOLO26 checkpoint, such as yolo26n.pt")
    readers = {".pt": torch_file.read, ".safetensors": _read_arrays, ".npz": _read_arrays}
    if path.suffix not in readers:
        raise InputError(f"{path} is neither .pt nor .safetensors nor .npz: convert it first")
    weights, names = readers[path.suffix](path)
    try:
        return Checkpoint(weights, names, identify(weights))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _read_arrays(path: Path) -> tuple[dict[str, mx.array], dict[int, str] | None]:
    try:
        _check_whole(path)
        arrays = mx.load(str(path))
        assert isinstance(arrays, dict)
        mx.eval(arrays)
        return arrays, None
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(
            f"{path} is damaged or not a {path.suffix} file ({reason}): download it again"
        ) from error


def _check_whole(path: Path) -> None:
    """Raise if a file is truncated or altered, which some releases of MLX do not notice."""
    if path.suffix == ".safetensors":
        files.read_header(path)
        return
    with files.open_regular(path) as stream:
        numpy_file.check(stream)


def identify(weights: Mapping[str, mx.array]) -> Architecture:
    """Identify task, scale and number of classes by names and shapes.

    Raises:
        InputError: These are not the weights of a YOLO26 that yolo-mlx has.
    """
    shapes = {canonical(name): tuple(array.shape) for name, array in weights.items()}
    stem = shapes.get("model.0.conv.weight")
    scale = STEMS.get(stem[0]) if stem is not None and len(stem) == 4 else None
    found = (re.match(r"model\.(\d+)\.", name) for name in shapes)
    head = max((int(match[1]) for match in found if match), default=0)
    ends = [f"model.{head}.one2one_cv3.{level}.4.weight" for level in range(3)]
    if any(name.startswith(f"model.{head}.linear.") for name in shapes):
        raise InputError("a classification network, which yolo-mlx does not have: give another")
    if scale is None or not all(end in shapes for end in ends):
        raise InputError("not a YOLO26 checkpoint: stem or one-to-one head is not there")
    if scale == "m" and any(name.startswith("model.2.m.1.") for name in shapes):
        scale = "l"
    parts = {name.split(".")[2] for name in shapes if name.startswith(f"model.{head}.")}
    task: Task = "detect"
    if "proto" in parts:
        task = "segment"
    elif "cv4_kpts" in parts:
        task = "pose"
    elif "cv4" in parts:
        raise InputError("oriented boxes (OBB) have no network in yolo-mlx: give another task")
    return Architecture(task, scale, shapes[ends[0]][0])
