"""Reads object labels in COCO's JSON format."""

from pathlib import Path
from typing import Any

import numpy as np

from ... import files
from ...errors import InputError
from .average_precision import Objects


def read_labels(path: str | Path, classes: int) -> dict[str, Objects]:
    """Read labels.

    Args:
        path: A JSON object with ``images``, ``annotations`` and ``categories``. Categories in the
            order of their ids are the network's classes.
        classes: Number of classes that the network has.

    Returns:
        File name of each image -> what is in it.

    Raises:
        InputError: The file is not in this format, or has another number of classes.
    """
    path = Path(path)
    data = files.read_json(path, files.LABELS)
    try:
        categories = sorted(int(entry["id"]) for entry in data["categories"])
        index = {category: position for position, category in enumerate(categories)}
        names = {entry["id"]: Path(entry["file_name"]).name for entry in data["images"]}
        rows: dict[str, list[tuple[Any, ...]]] = {name: [] for name in names.values()}
        for entry in data["annotations"]:
            x, y, width, height = (float(value) for value in entry["bbox"])
            row = (x, y, x + width, y + height, index[entry["category_id"]])
            rows[names[entry["image_id"]]].append((*row, bool(entry.get("iscrowd", 0))))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is not in COCO's format ({type(error).__name__}: {error!s:.80}): it needs "
            "images, annotations with bbox and category_id, and categories"
        ) from error
    if len(categories) != classes:
        raise InputError(
            f"{path} has {len(categories)} categories, the network has {classes} classes: list all "
            "of them under categories"
        )
    return {name: _objects(found) for name, found in rows.items()}


def _objects(rows: list[tuple[Any, ...]]) -> Objects:
    table = np.array([row[:5] for row in rows], np.float64).reshape(-1, 5)
    return Objects(table[:, :4], table[:, 4].astype(int), np.array([row[5] for row in rows], bool))
