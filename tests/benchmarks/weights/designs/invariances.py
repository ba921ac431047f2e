"""Changes of the weights that leave a model's function as it is."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from scipy.linalg import hadamard

from mlx_optiq_ext.weights.precision import Precision
from mlx_optiq_ext.weights.rounding.feedback import OutputSide
from mlx_optiq_ext.weights.rounding.metric import Metric

from .tensors import Tensor, rounded


def scales(together: list[Tensor], heads: tuple[int, int] | None) -> dict:
    """Powers of the inputs' mean squares.

    Args:
        together: Tensors with the same inputs.
        heads: Key heads and their size, for o: scales are the same in all query heads of one.
    """
    energy, found = np.diagonal(together[0].moments[0]), {}
    energy = np.maximum(energy / energy.mean(), 1e-6)
    if heads:
        count, size = heads
        apart = energy.reshape(count, -1, size)
        apart[:] = apart.mean(axis=1, keepdims=True)
    for bits in (3, 4):
        for power in (0.0, 0.05, 0.1, 0.2, 0.3, 0.5):
            by = (energy**power).astype(np.float32)
            left = [t.refined(Precision(bits, 64), by=by) for t in together]
            found[f"{bits} bits, power {power}"] = np.sum(left, axis=0).tolist()
    return found


def orders(tensor: Tensor, whole: np.ndarray, gradients: np.ndarray) -> dict:
    """Columns by their norm, by their norm in the metric, and with scales too."""
    energy = np.diagonal(tensor.moments[0])
    energy = np.maximum(energy / energy.mean(), 1e-6)
    norm, weighted = (np.sqrt(np.square(whole).T @ g) for g in (np.ones(len(whole)), gradients))
    ways = {
        "as it is": (None, None),
        "norm": (None, np.argsort(-norm)),
        "weighted norm": (None, np.argsort(-weighted)),
        "inputs": (None, np.argsort(-energy)),
    }
    for power in (0.05, 0.1):
        by = (energy**power).astype(np.float32)
        ways[f"norm, power {power}"] = by, np.argsort(-norm * by)
    return {n: tensor.refined(Precision(4, 64), by, order) for n, (by, order) in ways.items()}


def rotations(
    v: Tensor, o: Tensor, of_v: list[np.ndarray], of_o: list[np.ndarray], heads: int
) -> dict:
    """Of each key head's outputs in v and of its query heads' inputs in o.

    Args:
        v: All rows of it.
        o: All rows of it.
        of_v: Moments of its output gradients on both texts.
        of_o: Of the other's.
        heads: Key heads.
    """
    size = len(v.weight) // heads
    times = o.weight.shape[1] // len(v.weight)
    inputs = [o.moments[0][i * size : (i + 1) * size][:, i * size : (i + 1) * size]
              for i in range(heads * times)]  # fmt: skip
    mixed = hadamard(size) / np.sqrt(size)
    own = [np.linalg.eigh(sum(inputs[k * times : (k + 1) * times]))[1].T for k in range(heads)]
    ways = {
        "none": [np.eye(size)] * heads,
        "hadamard": [mixed] * heads,
        "eigenvectors": own,
        "eigenvectors, hadamard": [mixed @ turn for turn in own],
    }

    def left(weight: np.ndarray, moments: Sequence, gradients: Sequence, bits: int) -> list[float]:
        metric, outputs = (
            Metric(mx.array(moments[0])),
            OutputSide.of(np.ascontiguousarray(gradients[0], np.float32)),
        )
        error = weight - rounded(weight, metric, Precision(bits, 64), outputs=outputs)
        pairs = zip(moments, gradients, strict=True)
        return [0.5 * float(((g @ error @ h) * error).sum()) for h, g in pairs]

    found = {}
    for bits in (3, 4):
        for name, turns in ways.items():
            rows = diagonal(turns)
            columns = diagonal([turn for turn in turns for _ in range(times)])
            turned = [rows @ g @ rows.T for g in of_v]
            found[f"{bits} bits, {name}, v"] = left(rows @ v.weight, v.moments, turned, bits)
            turned = [columns @ h @ columns.T for h in o.moments]
            found[f"{bits} bits, {name}, o"] = left(o.weight @ columns.T, turned, of_o, bits)
    return found


def diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    """Square blocks along the diagonal."""
    size = len(blocks[0])
    whole = np.zeros((len(blocks) * size,) * 2, np.float32)
    for i, block in enumerate(blocks):
        whole[i * size : (i + 1) * size, i * size : (i + 1) * size] = block
    return whole
