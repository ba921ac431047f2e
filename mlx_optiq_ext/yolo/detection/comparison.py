"""Compares a quantized YOLO26 with its original."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx

from .. import images, loading, network
from ..divergence import Divergence, divergence, mean
from ..reading.checkpoint import read
from .average_precision import Objects, Precision, mean_precision
from .labels import read_labels

#: Least confidence of the original's detections that count as the truth.
SURE = 0.25


@dataclass(frozen=True)
class Evaluation:
    """A quantized network beside its original.

    Attributes:
        images: Number of images that could be read.
        skipped: A line for each image that could not be read or has no labels.
        agreement: Mean average precision against the original's own detections.
        labelled: Mean average precision of the quantized network against labels; None without
            labels.
        labelled_original: The original's; None without labels.
        error: Detection error, mean over images.
        seconds: Median time of one image through the network, quantized.
        seconds_original: Median time of one image through the original network.
    """

    images: int
    skipped: tuple[str, ...]
    agreement: Precision
    labelled: Precision | None
    labelled_original: Precision | None
    error: Divergence
    seconds: float
    seconds_original: float


def evaluate(
    quantized: str | Path,
    original: str | Path,
    folder: str | Path,
    *,
    labels: str | Path | None = None,
    image_size: int = 640,
) -> Evaluation:
    """Compare two checkpoints of the same network on images.

    Args:
        quantized: Output folder of ``run_yolo_pipeline``, or its ``.npz``.
        original: The checkpoint that it was made of.
        folder: Images.
        labels: COCO's JSON for them, for mean average precision against the truth.
        image_size: Longer side, a multiple of 32.

    Raises:
        InputError: A file or folder is not usable.
    """
    pictures, skipped = images.load(images.find(folder), image_size)
    models = [loading.load(path).model for path in (quantized, original)]
    truth: Mapping[str, Objects] | None = None
    if labels is not None:
        truth = read_labels(labels, models[1].nc)
    (found, times), (expected, times_original) = (_run(model, pictures) for model in models)
    agreement = mean_precision([Objects.of(rows, SURE) for rows in expected], found)
    scores: list[Precision | None] = [None, None]
    if truth is not None:
        known = [i for i, picture in enumerate(pictures) if picture.path.name in truth]
        there = [truth[pictures[i].path.name] for i in known]
        scores = [mean_precision(there, [rows[i] for i in known]) for rows in (found, expected)]
        skipped = [
            *skipped,
            *(f"{p.path} has no labels" for p in pictures if p.path.name not in truth),
        ]
    return Evaluation(
        len(pictures),
        tuple(skipped),
        agreement,
        scores[0],
        scores[1],
        _error(models, pictures),
        median(times),
        median(times_original),
    )


def _run(model: Any, pictures: list[images.Picture]) -> tuple[list[Any], list[float]]:
    """Detections and seconds for each image, after a warm-up image."""
    mx.eval(model(pictures[0].pixels))
    found, times = [], []
    for picture in pictures:
        start = time.perf_counter()
        mx.eval(model(picture.pixels))
        times.append(time.perf_counter() - start)
        found.append(network.detections(model, picture))
    return found, times


def _error(models: list[Any], pictures: list[images.Picture]) -> Divergence:
    for model in models:
        network.expose(model)
    values = []
    for picture in pictures:
        other, reference = (network.outputs(model, picture.pixels) for model in models)
        mx.eval(other.arrays(), reference.arrays())
        values.append(divergence(reference, other))
    return mean(values)


def detect(source: str | Path, image: str | Path, image_size: int = 640) -> Any:
    """Detections of one checkpoint in one image, (n, 6) as ``network.detections``."""
    return network.detections(
        loading.assemble(read(source)).model, images.fit(Path(image), image_size)
    )
