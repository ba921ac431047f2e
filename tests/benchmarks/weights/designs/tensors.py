"""A model's tensors, their moments on two texts, and what is left of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_optiq_ext.model.layers import quantizable
from mlx_optiq_ext.model.loading import load_unquantized
from mlx_optiq_ext.planning.calibration import Sampling, spread
from mlx_optiq_ext.weights import Request
from mlx_optiq_ext.weights.precision import Precision
from mlx_optiq_ext.weights.rounding.feedback import round_weight
from mlx_optiq_ext.weights.rounding.metric import Metric
from mlx_optiq_ext.weights.rounding.selection import HOST
from mlx_optiq_ext.weights.sensitivity.curvature import residual
from mlx_optiq_ext.weights.sensitivity.fisher import factors
from mlx_optiq_ext.weights.sensitivity.problem import layer_batches
from mlx_optiq_ext.weights.sensitivity.taylor import widest
from mlx_optiq_ext.weights.study import calibrated

KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, eq=False)
class Tensor:
    """Some rows of a weight in float32, and the moments on two texts; sums over tokens."""

    path: str
    weight: np.ndarray
    moments: tuple[np.ndarray, np.ndarray]
    gradients: np.ndarray
    unit: float

    @cached_property
    def metric(self) -> Metric:
        """Of the inputs."""
        return Metric(mx.array(self.moments[0]))

    def left(self, error: np.ndarray) -> list[float]:
        """What an error leaves on both texts, in nats per token."""
        return [
            float(self.gradients @ ((error @ moment) * error).sum(axis=1)) * self.unit
            for moment in self.moments
        ]

    def refined(self, precision: Precision, by=None, order=None, **how) -> list[float]:
        """What refinement leaves, with columns scaled and in another order."""
        scale = np.ones(self.weight.shape[1], np.float32) if by is None else by
        at = np.arange(len(scale)) if order is None else order
        weight, metric = self.weight, self.metric
        if by is not None or order is not None:
            weight = (weight * scale)[:, at]
            metric = Metric(mx.array((self.moments[0] / np.outer(scale, scale))[np.ix_(at, at)]))
        metric = how.pop("metric", metric)
        error = np.empty_like(self.weight)
        error[:, at] = weight - rounded(weight, metric, precision, **how)
        return self.left(error / scale)


def rounded(weight: np.ndarray, metric: Metric, precision: Precision, **how) -> np.ndarray:
    """A weight refined, with scales and biases in bfloat16."""
    how = {"steps": HOST, **how}
    words, *grids = round_weight(mx.array(weight), metric, precision, mx.bfloat16, **how)
    grids = [a.astype(mx.float32) for a in grids]
    size, bits = precision.group_size, precision.bits
    return np.array(mx.dequantize(words, *grids, group_size=size, bits=bits))


class Model:
    """A model with its factors on two texts, as arrays by tensor."""

    def __init__(self, folder: str, calibration: Path, sequences: int, layers: list[int]):
        self.model, tokenizer, _ = load_unquantized(folder)
        self.weights = {path: m.weight for path, m in quantizable(self.model)}
        sampling = Sampling(refining=2 * sequences)
        request = Request(budget=4.5, calibration=calibration, sampling=sampling, effort="refine")
        self.problem = calibrated(self.model, tokenizer, request)
        tokens = self.problem.calibration.refining
        parts = {f".layers.{index}." for index in layers}
        kept = {p for p in self.weights if ".layers." not in p or any(i in p for i in parts)}
        self.texts = [self.factors(tokens[start::2][:sequences], kept) for start in (0, 1)]

    def factors(self, tokens: np.ndarray, kept: set[str]) -> dict:
        """Moments of some tensors, as means over tokens."""
        return {p: found for block in self.blocks(tokens, kept) for p, found in block.items()}

    def blocks(self, tokens: np.ndarray, kept: set[str]) -> Iterator[dict]:
        """The same, a decoder layer at a time."""
        across = widest(self.problem.tensors) & kept
        for block in factors(self.model, layer_batches(tokens), across=across):
            found = {}
            for path in kept & set(block):
                arrays = block[path].arrays()
                found[path] = {k: np.array(a / block[path].tokens) for k, a in arrays.items()}
            block.clear()
            mx.clear_cache()
            yield found

    def every(self, sequences: int, rows: int) -> Iterator["Tensor"]:
        """Some rows of every tensor; an embedding's with the mean of its rows' moments."""
        tokens = self.problem.calibration.refining[:sequences]
        for block in self.blocks(tokens, set(self.weights)):
            for path, found in block.items():
                if "columns" in found:
                    moment = found["columns"] * found["lookups"].mean()
                    moment = moment + found.get("inputs", 0.0) * found.get("outputs", moment).mean()
                    ones = np.ones(len(self.weights[path]), np.float32)
                    found = {"inputs": moment, "outputs": ones}
                yield self.taken(path, rows, found, found)

    def tensor(self, path: str, rows: int) -> Tensor:
        """Some rows of a linear layer's weight."""
        return self.taken(path, rows, *(text[path] for text in self.texts))

    def taken(self, path: str, rows: int, own: dict, other: dict) -> Tensor:
        """Some rows of a weight, with its factors on two texts."""
        weight = np.array(self.weights[path].astype(mx.float32))
        at = spread(len(weight), min(rows, len(weight)))
        gradients = reduced(own["across"]) if "across" in own else own["outputs"]
        moments, unit = (own["inputs"], other["inputs"]), 0.5 * len(weight) / len(at)
        return Tensor(path, weight[at], moments, gradients[at], unit)

    def layer(self, index: int, rows: int) -> dict[str, Tensor]:
        """The tensors of a decoder layer by kind."""
        ends = {f"layers.{index}.{part}.{k}": k for part in ("self_attn", "mlp") for k in KINDS}
        paths = {k: p for p in self.weights for end, k in ends.items() if p.endswith("." + end)}
        return {kind: self.tensor(path, rows) for kind, path in paths.items()}


def reduced(moment: np.ndarray) -> np.ndarray:
    """The diagonal that error feedback leaves of a moment."""
    return np.array(residual(mx.array(moment)).diagonal)
