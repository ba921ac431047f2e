"""The share of the roofline that MLX reaches: coefficients fitted to published measurements.

The time of a token is linear in what it reads and launches (LLM-Viewer, arXiv 2402.16363, adds no
launch term; small models and Ultras need one). Coefficients are fitted in the log of the time with
Gaussian priors, so that a chip family with few measurements leans on the others. `FITTED` is what
``tests/latency`` fits over all of tests/data/latency/points.json.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from .chips import Chip


@dataclass(frozen=True)
class Efficiency:
    """Coefficients of the roofline.

    Attributes:
        bandwidth: Share of the memory bandwidth that a kernel reaches.
        two_dies: Factor on it for a chip of two dies.
        nvidia: Factor on it for MLX's CUDA back end.
        launch_us: Microseconds that a kernel takes beside its memory traffic, on an M3.
        generation: Factor on it per generation of Apple's.
        nvidia_launch: Factor on it for MLX's CUDA back end.
        expert_launches: Kernels of routing, sorting and summing in a layer of experts.
        recurrent_launches: Kernels of a recurrent layer beside its products.
        nvidia_recurrent_launches: Kernels of a recurrent layer in MLX's CUDA back end, which has no
            fused kernel for it.
    """

    bandwidth: float
    two_dies: float
    nvidia: float
    launch_us: float
    generation: float
    nvidia_launch: float
    expert_launches: float
    recurrent_launches: float
    nvidia_recurrent_launches: float

    def bytes_per_second(self, chip: Chip) -> float:
        """What a chip's kernels read per second."""
        peak = chip.bandwidth_gbs * 1e9
        if chip.launch_us is not None:
            return peak
        factor = self.two_dies if chip.dies > 1 else 1.0
        return peak * self.bandwidth * factor * (self.nvidia if chip.family == "nvidia" else 1.0)

    def seconds_per_launch(self, chip: Chip) -> float:
        """Seconds that a kernel takes beside its memory traffic."""
        if chip.launch_us is not None:
            return chip.launch_us * 1e-6
        if chip.family == "nvidia":
            return self.launch_us * self.nvidia_launch * 1e-6
        return self.launch_us * self.generation ** (chip.generation - 3) * 1e-6

    def recurrent(self, chip: Chip) -> float:
        """Kernels of a recurrent layer beside its products."""
        nvidia = chip.family == "nvidia"
        return self.nvidia_recurrent_launches if nvidia else self.recurrent_launches


NAMES = tuple(field.name for field in fields(Efficiency))

#: Where the fit starts, and how far (in the log) it expects to move: wide enough for the
#: measurements of a few chips to decide.
PRIOR = Efficiency(0.85, 1.0, 1.0, 3.0, 0.85, 1.0, 25.0, 12.0, 40.0)
_WIDTH = np.array([0.2, 0.15, 0.15, 0.5, 0.15, 0.5, 0.7, 0.7, 0.7])
#: Expected scatter of one measurement, in the log.
_SCATTER = 0.06


def fit(times: Callable[[Efficiency], Sequence[float]], measured: Sequence[float]) -> Efficiency:
    """Fit the coefficients to measured times.

    Args:
        times: Predicted seconds per token of every measurement, for given coefficients.
        measured: What was measured.

    Returns:
        The coefficients of least squared log error, with far-off measurements counting linearly
        (soft L1), by Levenberg-Marquardt steps with a numeric Jacobian.
    """
    wanted = np.log(np.asarray(measured, float))
    start = _logs(PRIOR)

    def residuals(logs: np.ndarray) -> np.ndarray:
        predicted = np.log(np.asarray(times(_from(logs)), float))
        misses = (predicted - wanted) / _SCATTER
        softened = np.sign(misses) * np.sqrt(2 * (np.sqrt(1 + misses**2) - 1))
        return np.concatenate([softened, (logs - start) / _WIDTH])

    logs, damping = start.copy(), 1e-2
    current = residuals(logs)
    for _ in range(100):
        jacobian = np.stack(
            [(residuals(logs + step) - current) / 1e-5 for step in 1e-5 * np.eye(len(logs))], axis=1
        )
        normal, slope = jacobian.T @ jacobian, jacobian.T @ current
        move = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -slope)
        following = residuals(logs + move)
        if following @ following < current @ current:
            done = math.sqrt(float(move @ move)) < 1e-6
            logs, current, damping = logs + move, following, damping / 3
            if done:
                break
        elif damping > 1e8:
            break
        else:
            damping *= 4
    return _from(logs)


def _logs(value: Efficiency) -> np.ndarray:
    return np.log([getattr(value, name) for name in NAMES])


def _from(logs: np.ndarray) -> Efficiency:
    return Efficiency(*(float(v) for v in np.exp(logs)))


#: Fitted over all published measurements (``tests/latency/test_published.py`` fits them again).
FITTED = Efficiency(
    bandwidth=0.883,
    two_dies=0.860,
    nvidia=0.931,
    launch_us=2.96,
    generation=0.765,
    nvidia_launch=0.856,
    expert_launches=26.4,
    recurrent_launches=10.4,
    nvidia_recurrent_launches=49.9,
)
