"""A generated YOLO26n: names and shapes of the real one, random weights."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

TENSORS = json.loads(
    (Path(__file__).parents[1] / "data" / "yolo" / "yolo26n_tensors.json").read_text()
)


@pytest.fixture(scope="session")
def tensors() -> list[tuple[str, str, tuple[int, ...]]]:
    """(Ultralytics' name, yolo-mlx's name, shape in MLX's layout) of every tensor of YOLO26n."""
    return [(theirs, ours, tuple(shape)) for theirs, ours, shape in TENSORS]


@pytest.fixture(scope="session")
def generated(tensors) -> dict[str, mx.array]:
    """Weights that keep activations of order one, by Ultralytics' names."""
    draw = np.random.default_rng(0)
    arrays = {}
    for name, _, shape in tensors:
        if len(shape) == 4:
            values = draw.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5
        elif name.endswith("running_var"):
            values = draw.uniform(0.5, 2, shape)
        elif name.endswith("bn.weight"):
            values = draw.uniform(0.7, 1.4, shape)
        else:
            values = draw.standard_normal(shape) * 0.1
        if name.startswith("model.23.") and "cv2." in name and name.split(".")[-2] == "2":
            values = values * 0.2 + name.endswith("bias") * 2.0  # boxes with sides above zero
        arrays[name] = mx.array(values.astype(np.float32))
    return arrays


@pytest.fixture(scope="session")
def checkpoint(generated, tmp_path_factory) -> Path:
    """The generated YOLO26n as a file."""
    path = tmp_path_factory.mktemp("yolo") / "yolo26n.safetensors"
    mx.save_safetensors(str(path), generated)
    return path
