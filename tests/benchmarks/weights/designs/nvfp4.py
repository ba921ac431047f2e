"""Rounding to MLX's mode nvfp4: 4-bit floats, and an 8-bit float as the scale of 16 of them."""

import numpy as np

from mlx_optiq_ext.weights.rounding.elimination import Elimination, eliminated
from mlx_optiq_ext.weights.rounding.metric import damped

GROUP = 16
POSITIVE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
LEVELS = np.concatenate([-POSITIVE[:0:-1], POSITIVE])
BETWEEN = (LEVELS[1:] + LEVELS[:-1]) / 2
#: Of e4m3, without zero.
SCALES = np.unique(
    [2.0**-9 * m for m in range(1, 8)]
    + [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)]
)[:-1].astype(np.float32)
#: Shares of the range that a search for a scale looks around.
RANGES = (1.6, 1.5, 1.4, 1.3, 1.2, 1.1, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)


def rounded(weight: np.ndarray, moment: np.ndarray, sweeps: int) -> np.ndarray:
    """A weight (rows, in) rounded with error feedback and passes of coordinate descent."""
    found = eliminated(damped(moment), GROUP)
    target = weight[:, found.columns]
    error, scales = _fed_back(target, found)
    own = np.diagonal(found.moment)
    for _ in range(sweeps):
        slope = error @ found.moment
        for c in range(target.shape[1]):
            taken, scale = target[:, c] - error[:, c], scales[:, c // GROUP]
            move = taken - nearest((taken + slope[:, c] / own[c]) / scale) * scale
            error[:, c] += move
            slope += np.outer(move, found.moment[c])
    result = np.empty_like(weight)
    result[:, found.columns] = target - error
    return result


def nearest(values: np.ndarray) -> np.ndarray:
    """The nearest 4-bit floats."""
    return LEVELS[np.searchsorted(BETWEEN, values)]


def _fed_back(target: np.ndarray, found: Elimination) -> tuple[np.ndarray, np.ndarray]:
    error, scales = np.zeros_like(target), []
    for start in range(0, target.shape[1], GROUP):
        at = slice(start, start + GROUP)
        share = np.diagonal(found.moment)[at]
        moved = target[:, at] + error[:, :start] @ found.coupling[:start, at]
        scales.append(scale := _scale(moved, share))
        for c in range(start, start + GROUP):
            wanted = target[:, c] + error[:, :c] @ found.coupling[:c, c]
            error[:, c] = target[:, c] - nearest(wanted / scale) * scale
    return error, np.stack(scales, axis=1)


def _scale(weight: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The scale of the least weighted error for each row of a group."""
    best, least = np.ones(len(weight), np.float32), np.full(len(weight), np.inf)
    for width in RANGES:
        place = np.searchsorted(SCALES, np.abs(weight).max(axis=1) * width / LEVELS[-1])
        for scale in (SCALES[np.clip(place - i, 0, len(SCALES) - 1)] for i in (0, 1)):
            left = nearest(weight / scale[:, None]) * scale[:, None] - weight
            error = np.square(left) @ share
            best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best
