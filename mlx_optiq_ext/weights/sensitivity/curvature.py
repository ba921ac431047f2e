"""Second moments in a reduced form that predicts the KL of many candidates quickly."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ..rounding import threads

#: Number of leading directions of a moment that are kept.
RANK = 32


@dataclass(frozen=True)
class Reduced:
    """A second moment (in, in) as ``diag(diagonal) + vectors vectors^T``.

    Attributes:
        diagonal: (in,), or (experts, in) for stacked experts.
        vectors: (in, rank); None for the diagonal alone.
    """

    diagonal: mx.array
    vectors: mx.array | None = None

    def energy(self, error: mx.array) -> mx.array:
        """The quadratic form of each row, (..., in) to (...)."""
        energy = (mx.square(error) @ self.diagonal[..., None])[..., 0]
        if self.vectors is not None:
            energy = energy + mx.square(error @ self.vectors).sum(axis=-1)
        return energy


@dataclass(frozen=True)
class Curvature:
    """The factored Hessian of the KL divergence in one tensor ``(..., out, in)``; sums over tokens.

    Attributes:
        inputs: Second moment of the inputs; None if the tensor is only looked up.
        outputs: Squared gradients at the outputs, (out,) or (experts, out).
        columns: Second moment of the gradients at looked-up rows; embeddings only.
        lookups: How often each row was looked up, (out,); embeddings only.
        tokens: Number of tokens, times the number of draws.
    """

    inputs: Reduced | None
    outputs: mx.array | None
    columns: Reduced | None
    lookups: mx.array | None
    tokens: int

    def kl(self, error: mx.array) -> float:
        """KL in nats per token that an error ``(..., out, in)`` in the weight adds."""
        return float(self.expected(error))

    def part(self, at: slice) -> "Curvature":
        """That of some rows, or of some stacked experts."""
        inputs, outputs, lookups = self.inputs, self.outputs, self.lookups
        if inputs is not None and inputs.diagonal.ndim == 2:
            inputs = Reduced(inputs.diagonal[at])
        return replace(
            self,
            inputs=inputs,
            outputs=None if outputs is None else outputs[at],
            lookups=None if lookups is None else lookups[at],
        )

    def expected(self, error: mx.array) -> mx.array:
        """As `kl`, not evaluated."""
        total = mx.array(0.0)
        if self.inputs is not None and self.outputs is not None:
            total = total + (self.outputs * self.inputs.energy(error)).sum()
        if self.columns is not None and self.lookups is not None:
            total = total + (self.lookups * self.columns.energy(error)).sum()
        # Both factors are sums over tokens; the divergence is the mean of their products.
        return (0.5 / max(self.tokens, 1) ** 2) * total


def leading(moment: mx.array, rank: int = RANK) -> Reduced:
    """Reduce a moment to its leading directions and its diagonal.

    Inputs share a few strong directions, in which the errors of a row add up. The remaining
    off-diagonal part is small, and rounding errors have random signs there. The directions come
    from the Nystrom approximation after one subspace iteration (Halko et al., arXiv 0909.4061).

    Args:
        moment: (in, in), symmetric and positive semidefinite.
        rank: Directions to keep. A moment of at most twice that size is factored exactly.
    """
    size = moment.shape[0]
    if size <= 2 * rank:
        values, directions = mx.linalg.eigh(moment, stream=mx.cpu)
        return Reduced(mx.zeros(size), directions * mx.sqrt(mx.maximum(values, 0)))
    start = mx.random.normal((size, rank), key=mx.random.key(0))
    basis = mx.linalg.qr(moment @ start, stream=mx.cpu)[0]
    seen = moment @ basis
    values, turn = mx.linalg.eigh(basis.T @ seen, stream=mx.cpu)
    # Rounding noise in a direction without energy must not be amplified.
    inverse = mx.where(values > 1e-6 * values[-1], mx.rsqrt(mx.maximum(values, 1e-30)), 0)
    vectors = (seen @ turn) * inverse
    left = mx.diag(moment) - mx.square(vectors).sum(axis=-1)
    return Reduced(mx.maximum(left, 0), vectors)


def residual(moment: mx.array, damping: float = 0.02) -> Reduced:
    """The part of each input's second moment that remains after error feedback.

    With ``H = U^T D U`` and ``U`` unit upper triangular in the order of rounding, feedback leaves
    an error of ``tr(D noise)`` (QuIP, Chee et al., arXiv 2307.13304).

    Args:
        moment: (in, in), symmetric.
        damping: Share of the mean diagonal that is added to the diagonal.
    """
    return Reduced(mx.array(_left(np.array(moment), damping)))


def residuals(moments: Sequence[mx.array], damping: float = 0.02) -> list[Reduced]:
    """What `residual` finds for each of several moments, side by side, and once for equal ones."""
    exact = [np.array(moment) for moment in moments]
    first = [
        next(j for j in range(i + 1) if j == i or np.array_equal(exact[j], exact[i]))
        for i in range(len(exact))
    ]
    different = sorted(set(first))
    left = threads.each(lambda i: _left(exact[i], damping), different)
    found = {i: Reduced(mx.array(one)) for i, one in zip(different, left, strict=True)}
    return [found[i] for i in first]


def _left(exact: np.ndarray, damping: float) -> np.ndarray:
    """The diagonal of ``D``, (in,), of a moment of which nothing is changed."""
    damped = exact[::-1, ::-1].copy()
    damped[np.diag_indices(len(damped))] += damping * np.diagonal(exact).mean()
    lower = np.linalg.cholesky(damped)
    return np.square(np.diagonal(lower))[::-1].copy()
