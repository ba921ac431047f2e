"""Lloyd-Max codebooks for the coordinates of a random unit vector."""

from functools import cache
from itertools import pairwise

import numpy as np

#: Widths that a codebook is made for.
BITS = (1, 2, 3, 4)
#: Points on which the distribution's integral is tabulated.
_POINTS = 200_001
#: Change of a level, relative to the standard deviation, at which the iteration stops.
_SETTLED = 1e-9


@cache
def levels(dim: int, bits: int) -> tuple[float, ...]:
    """The positive reconstruction levels, ascending; their negatives complete the codebook.

    A coordinate of a vector drawn uniformly from the unit sphere has the density
    ``(1 - x^2)^((dim - 3) / 2)``, a Beta distribution on [-1, 1] (TurboQuant, Zandieh et al.,
    arXiv 2504.19874, lemma 1). It is symmetric, so half of the codebook is enough. Lloyd's
    iteration then converges to the optimal scalar quantizer of that density.

    Args:
        dim: Dimension of the vector, 3 or more.
        bits: 1 to 4.

    Returns:
        ``2 ** (bits - 1)`` numbers in (0, 1).
    """
    power = (dim - 3) / 2
    # The density is negligible beyond twelve standard deviations.
    x = np.linspace(0.0, min(1.0, 12 / dim**0.5), _POINTS)
    density = (1 - x**2) ** power
    steps = (density[1:] + density[:-1]) / 2
    moments = (x[1:] * density[1:] + x[:-1] * density[:-1]) / 2
    mass = np.concatenate([[0.0], np.cumsum(steps)])
    moment = np.concatenate([[0.0], np.cumsum(moments)])
    count = 2 ** (bits - 1)
    found = np.interp((np.arange(count) + 0.5) / count, mass / mass[-1], x)
    while True:
        edges = np.concatenate([[0.0], (found[1:] + found[:-1]) / 2, [x[-1]]])
        masses = np.diff(np.interp(edges, x, mass))
        new = np.diff(np.interp(edges, x, moment)) / masses
        if np.abs(new - found).max() < _SETTLED / dim**0.5:
            return tuple(float(level) for level in new)
        found = new


def boundaries(dim: int, bits: int) -> tuple[float, ...]:
    """Magnitudes at which the nearest level changes, ascending: ``2 ** (bits - 1) - 1`` of them."""
    found = levels(dim, bits)
    return tuple((one + other) / 2 for one, other in pairwise(found))
