"""Statistics over many items: standard errors, and paired tests."""

import math
from collections.abc import Sequence

import numpy as np


def clustered_error(sequences: Sequence[np.ndarray]) -> float:
    """Standard error of the mean over all positions.

    Positions of one sequence depend on each other, so sequences are treated as clusters, and this
    is the error of a ratio of sums over clusters. With a single sequence, positions count as
    independent.
    """
    sizes = np.array([len(s) for s in sequences], float)
    total = np.concatenate(sequences) if sequences else np.zeros(0)
    if len(total) < 2:
        return math.nan
    if len(sequences) < 2:
        return float(total.std(ddof=1) / math.sqrt(len(total)))
    sums = np.array([s.sum() for s in sequences], float)
    misses = sums - sizes * total.mean()
    count = len(sequences)
    return float(math.sqrt(count / (count - 1) * (misses @ misses)) / sizes.sum())


def proportion_error(hits: Sequence[bool]) -> float:
    """Standard error of a share, as lm-eval gives it (sample standard deviation over root n)."""
    values = np.asarray(hits, float)
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, float]:
    """McNemar's exact test on the same items.

    Returns:
        Items that only the first got right, items that only the second did, and the two-sided
        probability of a split as uneven if both were equally good. Source: McNemar, Psychometrika
        12 (1947), in its exact binomial form.
    """
    pairs = list(zip(first, second, strict=True))
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    count, least = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(count, k) for k in range(least + 1))
    return only_first, only_second, min(1.0, float(2 * tail / 2**count))
