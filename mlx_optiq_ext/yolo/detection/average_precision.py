"""Average precision of detections, as COCO defines it.

For each class and each IoU threshold from 0.50 to 0.95, detections are matched, best first, to the
free object that they overlap most. Precision is made monotonic and read at 101 recalls. At most 100
detections an image count. A crowd may be taken any number of times, and what takes it is neither
right nor wrong. Source: Lin et al., "Microsoft COCO" (2014), and its evaluation server's rules.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MOST = 100


@dataclass(frozen=True)
class Objects:
    """The objects in an image.

    Attributes:
        boxes: (n, 4) left, top, right, bottom.
        classes: (n,) class index.
        crowd: (n,) whether it stands for many objects.
    """

    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray

    @classmethod
    def of(cls, detections: np.ndarray, least: float) -> "Objects":
        """Detections (n, 6) of at least this confidence, taken as the truth."""
        kept = detections[detections[:, 4] >= least]
        return cls(kept[:, :4], kept[:, 5].astype(int), np.zeros(len(kept), bool))


@dataclass(frozen=True)
class Precision:
    """Mean average precision over classes that have objects; nan if none has.

    Attributes:
        map50_95: Mean over the ten thresholds.
        map50: At an IoU of 0.5.
    """

    map50_95: float
    map50: float


def mean_precision(truth: Sequence[Objects], found: Sequence[np.ndarray]) -> Precision:
    """Mean average precision.

    Args:
        truth: What is in each image.
        found: For each image (n, 6) left, top, right, bottom, confidence, class.
    """
    classes = sorted({int(c) for objects in truth for c in objects.classes[~objects.crowd]})
    if not classes:
        return Precision(float("nan"), float("nan"))
    table = np.array([_class_precision(c, truth, found) for c in classes])
    return Precision(float(table.mean()), float(table[:, 0].mean()))


def _class_precision(
    index: int, truth: Sequence[Objects], found: Sequence[np.ndarray]
) -> np.ndarray:
    """(thresholds,) average precision of one class."""
    scores, hits, ignored, count = [], [], [], 0
    for objects, rows in zip(truth, found, strict=True):
        mine = objects.classes == index
        boxes, crowd = objects.boxes[mine], objects.crowd[mine]
        order = np.argsort(crowd, kind="stable")  # crowds last: matched only if no other object is
        boxes, crowd = boxes[order], crowd[order]
        rows = rows[rows[:, 5] == index]
        rows = rows[np.argsort(-rows[:, 4], kind="stable")][:MOST]
        taken, skipped = _assigned(boxes, crowd, rows[:, :4])
        scores.append(rows[:, 4])
        hits.append(taken)
        ignored.append(skipped)
        count += int((~crowd).sum())
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hit = np.concatenate(hits, axis=1)[:, order]
    counted = ~np.concatenate(ignored, axis=1)[:, order]
    right = np.cumsum(hit & counted, axis=1)
    wrong = np.cumsum(~hit & counted, axis=1)
    result = np.zeros(len(THRESHOLDS))
    for line in range(len(THRESHOLDS)):
        recall = right[line] / count
        precision = right[line] / np.maximum(right[line] + wrong[line], np.spacing(1))
        falling = np.maximum.accumulate(precision[::-1])[::-1]
        at = np.searchsorted(recall, RECALLS, side="left")
        result[line] = np.append(falling, 0)[at].mean()
    return result


def _assigned(
    boxes: np.ndarray, crowd: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(thresholds, detections) which ones hit an object, and which ones count for nothing."""
    hit = np.zeros((len(THRESHOLDS), len(rows)), bool)
    ignored = np.zeros_like(hit)
    overlaps = _overlaps(rows, boxes, crowd)
    for line, threshold in enumerate(THRESHOLDS):
        free = np.ones(len(boxes), bool)
        for row in range(len(rows)):
            best, chosen = min(threshold, 1 - 1e-10), -1
            for candidate in range(len(boxes)):
                if not free[candidate] and not crowd[candidate]:
                    continue
                if chosen >= 0 and not crowd[chosen] and crowd[candidate]:
                    break
                if overlaps[row, candidate] >= best:
                    best, chosen = overlaps[row, candidate], candidate
            if chosen >= 0:
                free[chosen] = False
                hit[line, row], ignored[line, row] = True, crowd[chosen]
    return hit, ignored


def _overlaps(rows: np.ndarray, boxes: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """(detections, objects) IoU; with a crowd, the part of the detection inside it."""
    low = np.maximum(rows[:, None, :2], boxes[None, :, :2])
    high = np.minimum(rows[:, None, 2:], boxes[None, :, 2:])
    shared = np.maximum(high - low, 0).prod(-1)
    area = (rows[:, 2:] - rows[:, :2]).prod(-1)[:, None]
    other = (boxes[:, 2:] - boxes[:, :2]).prod(-1)[None]
    union = np.where(crowd[None], area, area + other - shared)
    return shared / np.maximum(union, np.spacing(1))
