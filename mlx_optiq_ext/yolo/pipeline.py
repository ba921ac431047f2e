"""Converts a YOLO26 checkpoint to a smaller file that yolo-mlx loads unchanged."""

import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import files
from .._version import __version__
from ..errors import InputError
from . import archive, hessian, images, network, steps
from .network import Layer
from .reading.checkpoint import Architecture, Checkpoint, read
from .steps import DetectionPlan, Detector

#: More images than this take time without a benefit.
MOST_IMAGES = 32
#: Fewer images than this are warned of.
FEW_IMAGES = 8

METADATA = "optiq_metadata.json"


@dataclass(frozen=True)
class Result:
    """The result of a conversion.

    Attributes:
        path: The weights, for ``yolo26mlx.YOLO(path)`` or ``mlx_optiq_ext.yolo.load``.
        plan: Each layer's choice, with the measured detection error.
        source_bytes: Size of the checkpoint that was read.
    """

    path: Path
    plan: DetectionPlan
    source_bytes: int

    def summary(self) -> str:
        """One line for the user."""
        plan, error = self.plan, self.plan.error
        assert error is not None
        return (
            f"[optiq] {self.path}: {plan.file_bytes:,} bytes ({plan.bits_per_weight:.3f} bits per "
            f"weight), {self.source_bytes:,} before; detection error on held-out images: classes "
            f"{error.classes:.4g} nats, boxes {error.boxes:.4g}"
        )


def run_yolo_pipeline(
    source: str | Path,
    out: str | Path,
    *,
    calibration: str | Path,
    budget: float = 5.0,
    image_size: int = 640,
    protect: bool = False,
) -> Result:
    """Quantize a YOLO26 layer by layer within a byte budget.

    Args:
        source: A ``.pt``, ``.safetensors`` or ``.npz`` checkpoint.
        out: Folder to write: ``yolo26n.npz`` (by task and scale) and ``optiq_metadata.json``.
        calibration: Folder with a few images such as the network will see.
        budget: All bits of the file over all parameters.
        image_size: Longer side of the images while measuring, a multiple of 32.
        protect: Keep the first convolution and the last ones of the head at 8 bits' steps.

    Returns:
        The path, the plan and what was measured.

    Raises:
        InputError: A file, folder or value is not usable.
        BudgetError: No plan fits.
        UnsupportedError: yolo-mlx or Pillow is not installed.
    """
    source, out = Path(source), Path(out)
    check(source, out, calibration, budget)
    network.library()
    checkpoint = read(source)
    paths = images.find(calibration)
    chosen = [paths[i * len(paths) // MOST_IMAGES] for i in range(MOST_IMAGES)]
    pictures, skipped = images.load(paths if len(paths) <= MOST_IMAGES else chosen, image_size)
    for line in skipped:
        print(f"[optiq] {line}", file=sys.stderr)
    if len(pictures) < FEW_IMAGES:
        print(
            f"[optiq] Warning: {len(pictures)} images calibrate and judge; with fewer than "
            f"{FEW_IMAGES} a plan may suit them and little else",
            file=sys.stderr,
        )
    calibrating, judging = split(pictures)
    detector, model = study(checkpoint, calibrating, protect=protect)
    references = [(picture, network.outputs(model, picture.pixels)) for picture in judging]
    mx.eval([reference.arrays() for _, reference in references])
    plan, stored = steps.best(detector, budget, model, references)
    name = f"{checkpoint.architecture.name}.npz"
    with files.staged(out) as folder:
        folder.mkdir()
        size = archive.write(folder / name, {steps.file_name(n): a for n, a in stored.items()})
        assert size == plan.file_bytes, "the file is not as large as it was planned to be"
        record = _record(checkpoint, plan, budget, pictures, image_size)
        files.write_json(folder / METADATA, record)
    return Result(out / name, plan, source.stat().st_size)


def check(source: Path, out: Path, calibration: str | Path, budget: float) -> None:
    """Refuse unusable arguments before anything is read."""
    if not source.is_file():
        raise InputError(f"{source} is not a file: give a YOLO26 checkpoint, such as yolo26n.pt")
    if out.exists():
        raise InputError(f"{out} exists already: remove it or name another output folder")
    if not 0 < budget <= 32:
        raise InputError(f"a budget of {budget:g} bits per weight is not above 0 and up to 32")
    images.find(calibration)


def split(pictures: list[Any]) -> tuple[list[Any], list[Any]]:
    """Split images for calibration and judging: every fourth is held out, or the last of fewer.

    Raises:
        InputError: There is a single one.
    """
    if len(pictures) < 2:
        raise InputError(
            f"{pictures[0].path} is the only image to calibrate on, and none is left to judge "
            f"plans on: give two at least, better {FEW_IMAGES} or more"
        )
    judging = pictures[3::4] or pictures[-1:]
    return [p for p in pictures if all(p is not q for q in judging)], judging


def study(
    checkpoint: Checkpoint,
    pictures: list[Any],
    *,
    protect: bool = False,
) -> tuple[Detector, Any]:
    """Measure a network.

    Returns:
        The input for planning, and the exposed network.
    """
    model = network.load(checkpoint)
    arrays = {name: np.array(a) for name, a in network.parameters(model).items()}
    layers = network.layers(model)
    network.expose(model)
    measured = hessian.measure(model, layers, pictures)
    protected = frozenset(_ends(layers, measured) if protect else ())
    return Detector(tuple(layers), arrays, measured, protected), model


def _ends(layers: list[Layer], measured: hessian.Measured) -> list[str]:
    """The stem and the layers that end a branch of the head."""
    used = [layer for layer in layers if not measured.unused(layer.path)]
    return [used[0].path, *(layer.path for layer in used if layer.norm is None)]


def _record(
    checkpoint: Checkpoint, plan: DetectionPlan, budget: float, pictures: list[Any], image_size: int
) -> dict[str, Any]:
    architecture: Architecture = checkpoint.architecture
    return {
        "method": "yolo26 integer codes",
        "model_type": "yolo",
        "task": architecture.task,
        "scale": architecture.scale,
        "classes": architecture.classes,
        "names": checkpoint.names,
        "target_bpw": budget,
        "achieved_bpw": plan.bits_per_weight,
        "file_bytes": plan.file_bytes,
        "channel_rule": plan.rule,
        "error": asdict(plan.error) if plan.error else None,
        "per_layer": {path: asdict(choice) for path, choice in plan.choices.items()},
        "calibration": {
            "images": [picture.path.name for picture in pictures],
            "image_size": image_size,
        },
        "versions": {
            "mlx_optiq_ext": __version__,
            "mlx": metadata.version("mlx"),
            "yolo_mlx": metadata.version("yolo-mlx"),
        },
    }
