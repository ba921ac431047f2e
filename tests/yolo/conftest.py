"""A generated YOLO26n: names and shapes of the real one, random weights."""

import importlib
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

#: Sides of the images in the network.
SIZE = 64

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


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Five images with shapes in them; sides differ, so that padding does too."""
    Image, ImageDraw = (importlib.import_module(f"PIL.{n}") for n in ("Image", "ImageDraw"))
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(5)
    for index in range(5):
        image = Image.new("RGB", (90 + 30 * index, 120), tuple(draw.integers(0, 255, 3)))
        pen = ImageDraw.Draw(image)
        for _ in range(6):
            x, y, w, h = draw.integers(0, 70, 4).tolist()
            pen.ellipse((x, y, x + w + 5, y + h + 5), fill=tuple(draw.integers(0, 255, 3).tolist()))
        image.save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def converted(checkpoint, photos, tmp_path_factory):
    """The generated YOLO26n at three budgets: budget -> result."""
    from mlx_optiq_ext import yolo

    out = tmp_path_factory.mktemp("out")
    return {
        budget: yolo.run_yolo_pipeline(
            checkpoint, out / str(budget), calibration=photos, budget=budget, image_size=SIZE
        )
        for budget in (3.5, 5, 7)
    }
