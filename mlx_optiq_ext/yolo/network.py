"""YOLO26 as yolo-mlx builds it: convolutions, outputs before selection, and detections.

yolo-mlx is AGPL: it is imported if it is installed, and none of its code is copied here.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..errors import UnsupportedError
from .images import Picture
from .reading.checkpoint import Architecture, Checkpoint
from .reading.naming import matched


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer.

    Attributes:
        path: Its path in the network, as yolo-mlx names it.
        module: The module.
        norm: The batch normalization after it, or None.
        norm_path: Path of the batch normalization.
        transposed: Whether it is a transposed convolution.
    """

    path: str
    module: Any
    norm: Any
    norm_path: str
    transposed: bool


@dataclass(frozen=True)
class Outputs:
    """Outputs of the one-to-one head at every anchor, before any selection.

    Attributes:
        boxes: (anchors, 4) centre x, centre y, width, height in pixels.
        scores: (anchors, classes) probabilities.
        extra: (anchors, m) mask coefficients or key points; m may be 0.
        masks: (height, width, prototypes), or None.
    """

    boxes: mx.array
    scores: mx.array
    extra: mx.array
    masks: mx.array | None

    def arrays(self) -> list[mx.array]:
        """All arrays, for evaluation."""
        return [self.boxes, self.scores, self.extra, *([] if self.masks is None else [self.masks])]


def library() -> Any:
    """The yolo-mlx package.

    Raises:
        UnsupportedError: yolo-mlx is not installed, or cannot be imported.
    """
    try:
        importlib.import_module("yolo26mlx.nn.tasks")
        return importlib.import_module("yolo26mlx")
    except ImportError as error:
        raise UnsupportedError(
            f"YOLO26 needs yolo-mlx ({error}): pip install 'mlx-optiq-ext[yolo]', in an "
            "environment of its own because it needs mlx below 0.31"
        ) from error


def build(architecture: Architecture) -> Any:
    """A network with random weights, in evaluation mode."""
    suffix = architecture.name.removeprefix(f"yolo26{architecture.scale}")
    tasks = library().nn.tasks
    model = tasks.build_model(
        cfg=f"yolo26{suffix}.yaml", scale=architecture.scale, nc=architecture.classes, verbose=False
    )
    model.eval()
    return model


def load(checkpoint: Checkpoint) -> Any:
    """The network of a checkpoint, in float32 except for integer codes.

    Raises:
        InputError: Tensors are missing, unknown or of another shape.
    """
    model = build(checkpoint.architecture)
    expected = parameters(model)
    kinds = {
        f"{layer.path}.weight": "conv_transpose" if layer.transposed else "conv"
        for layer in layers(model)
    }
    shapes = {name: tuple(array.shape) for name, array in expected.items()}
    found = matched(checkpoint.weights, shapes, kinds)
    put(model, {**expected, **found})
    return model


def put(model: Any, arrays: Mapping[str, mx.array]) -> None:
    """Set every parameter; floats become float32."""
    model.load_weights(
        [
            (name, a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a)
            for name, a in arrays.items()
        ],
        strict=True,
    )
    mx.eval(model.parameters())


def parameters(model: Any) -> dict[str, mx.array]:
    """Every array of a network by name, strides included."""
    entries = tree_flatten(model.parameters())
    assert isinstance(entries, list)
    return dict(entries)


def layers(model: Any) -> list[Layer]:
    """The layers whose weights can be quantized, in the network's order."""
    modules = dict(model.named_modules())
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    found = []
    for path in sorted(modules, key=_order):
        module = modules[path]
        if isinstance(module, kinds):
            parent, _, name = path.rpartition(".")
            norm_path = f"{parent}.bn" if name in ("conv", "conv_transpose") else ""
            norm = modules.get(norm_path) if norm_path else None
            transposed = isinstance(module, nn.ConvTranspose2d)
            found.append(Layer(path, module, norm, norm_path if norm else "", transposed))
    return found


def _order(path: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]


def expose(model: Any) -> None:
    """Make the network return its one-to-one outputs at every anchor, with gradients.

    Without this it selects the best detections, and stops gradients before the one-to-one branches.
    The training branches are removed, so their parameters are not accessible afterwards.
    """
    head = model.model.layers[-1]
    for name in [name for name in head if name.startswith("one2one_")]:
        setattr(head, name.removeprefix("one2one_"), head[name])
    head.end2end = False


def outputs(model: Any, pixels: mx.array) -> Outputs:
    """Run an exposed network.

    Args:
        model: A network after ``expose``.
        pixels: (1, height, width, 3).
    """
    result = model(pixels)
    rows, masks = result if isinstance(result, tuple) else (result, None)
    if isinstance(masks, tuple):  # prototypes, and a map that only training uses
        masks = masks[0]
    rows, classes = rows[0], model.nc
    extra = rows[:, 4 + classes :]
    return Outputs(
        rows[:, :4], rows[:, 4 : 4 + classes], extra, None if masks is None else masks[0]
    )


def detections(model: Any, picture: Picture, least: float = 0.001) -> np.ndarray:
    """Detections in pixels of the original image.

    Args:
        model: A network as it was built, not exposed.
        picture: The image.
        least: Confidence below which rows are left out.

    Returns:
        (n, 6) left, top, right, bottom, confidence, class; best first.
    """
    result = model(picture.pixels)
    rows = np.array((result[0] if isinstance(result, tuple) else result)[0].astype(mx.float32))
    rows = rows[rows[:, 4] > least]
    return np.concatenate([picture.restored(rows[:, :4]), rows[:, 4:6]], axis=1)
