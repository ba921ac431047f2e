"""Second moments of one tensor's inputs and output gradients: its factored Fisher information.

Gradients whose covariance at the logits is the Hessian of KL(reference || model) there have that of
every weight as their covariance, but for the model's own curvature (Martens, arXiv 1412.1193). For
one layer it factors into the second moments of its inputs and of the gradients at its outputs
(K-FAC, Martens and Grosse, arXiv 1503.05671); sensitivity needs only the
diagonal of the latter, rounding uses it whole.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx

from ...model.spill import Spill, Spilled
from ...model.taps import Use
from .curvature import Curvature, Reduced, leading, residual, residuals


@dataclass
class Factors:
    """Sums over tokens for one tensor ``(..., out, in)``.

    Attributes:
        inputs: Second moment of the inputs, (in, in); for stacked experts its diagonal,
            (experts, in), over the tokens of each.
        outputs: Squared gradients at the outputs, (out,) or (experts, out).
        uses: Tokens that each expert saw, (experts,); stacked experts only.
        lookups: How often each row was looked up, (vocabulary,); embeddings only.
        columns: Second moment of the gradients at looked-up rows, (dim, dim); embeddings only.
        across: Second moment of the gradients at the outputs, (out, out), if requested.
        tokens: Number of tokens in the batches, times the number of draws.
    """

    inputs: mx.array | None = None
    outputs: mx.array | None = None
    uses: mx.array | None = None
    lookups: mx.array | None = None
    columns: mx.array | None = None
    across: mx.array | None = None
    tokens: int = 0

    @property
    def seen(self) -> bool:
        """Whether any gradient reached the tensor."""
        return self.inputs is not None or self.columns is not None

    @property
    def kept(self) -> "Factors":
        """The factors that rounding needs, without those that only sensitivity uses."""
        if self.columns is not None:
            return self
        return Factors(across=self.across, tokens=self.tokens)

    @property
    def moment(self) -> mx.array | None:
        """What the error of one row is measured with, (in, in), as rounding has it.

        An embedding that is also the head is measured as both. None for stacked experts, of whose
        inputs only the diagonal is known, and if no gradient came.
        """
        if self.columns is None or self.lookups is None:
            return self.inputs if self.uses is None else None
        moment = self.columns * mx.mean(self.lookups)
        if self.inputs is not None and self.outputs is not None:
            moment = moment + self.inputs * mx.mean(self.outputs)
        return moment

    def arrays(self) -> dict[str, mx.array]:
        """The existing arrays, by name."""
        return {name: part for name, part in vars(self).items() if isinstance(part, mx.array)}

    def curvature(
        self, *, feedback: bool = False, reduced: Mapping[int, Reduced] | None = None
    ) -> Curvature:
        """The curvature that predicts the KL of an error in the weight.

        Args:
            feedback: Predict the KL that remains after error feedback along both sides. For stacked
                experts this is not available.
            reduced: From `after_feedback`, which computes those of several tensors at once.
        """

        def reduce(moment: mx.array) -> Reduced:
            if not feedback:
                return leading(moment)
            return reduced[id(moment)] if reduced is not None else residual(moment)

        inputs, outputs = None, self.outputs
        if self.inputs is not None and outputs is not None:
            if self.uses is not None:
                # Means over each expert's tokens.
                outputs = outputs * (self.tokens / mx.maximum(self.uses, 1))[:, None]
                inputs = Reduced(self.inputs)
            else:
                inputs = reduce(self.inputs)
                if feedback and self.across is not None:
                    outputs = reduce(self.across).diagonal
        columns = None if self.columns is None else reduce(self.columns)
        return Curvature(inputs, outputs, columns, self.lookups, self.tokens)

    def add(
        self, use: Use, gradient: mx.array, shape: tuple[int, ...], *, across: bool = False
    ) -> None:
        """Add one use of a weight of this shape, with the gradient at its outputs.

        Nothing is evaluated. Stacked weights that take no expert indices (one matrix per head) are
        not factored.
        """
        gradients = gradient.astype(mx.float32).reshape(-1, gradient.shape[-1])
        squares = mx.square(gradients)
        if use.lookup:
            counts = mx.zeros(shape[:1]).at[use.inputs.reshape(-1)].add(1.0)
            self.lookups = _plus(self.lookups, counts)
            self.columns = _plus(self.columns, gradients.T @ gradients)
        elif use.indices is not None:
            lead = use.outputs.shape[:-1]
            rows = mx.broadcast_to(use.inputs, (*lead, use.inputs.shape[-1]))
            rows = mx.square(rows.astype(mx.float32)).reshape(-1, use.inputs.shape[-1])
            expert = mx.broadcast_to(use.indices[..., None], lead).reshape(-1)
            self.inputs = _plus(self.inputs, mx.zeros((shape[0], shape[2])).at[expert].add(rows))
            self.outputs = _plus(self.outputs, mx.zeros(shape[:2]).at[expert].add(squares))
            self.uses = _plus(self.uses, mx.zeros(shape[:1]).at[expert].add(1.0))
        elif len(shape) == 2:
            rows = use.inputs.astype(mx.float32).reshape(-1, use.inputs.shape[-1])
            self.inputs = _plus(self.inputs, rows.T @ rows)
            self.outputs = _plus(self.outputs, squares.sum(axis=0))
            if across:
                self.across = _plus(self.across, gradients.T @ gradients)


class SpilledFactors(Mapping[str, Factors]):
    """Factors on disk; each look-up reads them again."""

    def __init__(self, spill: Spill):
        self._arrays, self._tokens = Spilled(spill), {}

    def update(self, found: Mapping[str, Factors]) -> None:
        """Write some factors."""
        self._tokens.update({path: factor.tokens for path, factor in found.items()})
        parts = {path: factor.arrays() for path, factor in found.items()}
        self._arrays.add({path: part for path, part in parts.items() if part})

    def __getitem__(self, path: str) -> Factors:
        found = self._arrays.get(path, {})
        return Factors(**found, tokens=self._tokens[path])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tokens)

    def __len__(self) -> int:
        return len(self._tokens)


def after_feedback(found: Iterable[Factors]) -> dict[int, Reduced]:
    """What error feedback leaves of the moments of several tensors, by the ``id`` of each."""
    moments: list[mx.array] = []
    for factors in found:
        if factors.inputs is not None and factors.outputs is not None and factors.uses is None:
            moments += (
                [factors.inputs] if factors.across is None else [factors.inputs, factors.across]
            )
        if factors.columns is not None:
            moments.append(factors.columns)
    return {id(m): r for m, r in zip(moments, residuals(moments), strict=True)}


def _plus(total: mx.array | None, more: mx.array) -> mx.array:
    return more if total is None else total + more
