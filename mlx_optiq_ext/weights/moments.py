"""Second moments of one tensor's inputs and output gradients: its factored Fisher information.

Gradients whose covariance at the logits is the Hessian of KL(reference || model) there have that of
every weight as their covariance, but for the model's own curvature (Martens, arXiv 1412.1193). For
one layer it factors into the second moments of its inputs and of the gradients at its outputs
(K-FAC, Martens and Grosse, arXiv 1503.05671); of the latter costing needs the diagonal only,
rounding uses it whole.
"""

from dataclasses import dataclass

import mlx.core as mx

from .reduced import Reduced, leading, residual
from .taps import Use


@dataclass
class Factors:
    """Sums over the tokens seen, for one tensor ``(..., out, in)``.

    Attributes:
        inputs: Second moment of the inputs, (in, in); for stacked experts its diagonal,
            (experts, in), over the tokens of each.
        outputs: Squared gradients at the outputs, (out,) or (experts, out).
        uses: Tokens that each expert saw, (experts,); stacked experts only.
        lookups: How often each row was looked up, (vocabulary,); embeddings only.
        columns: Second moment of the gradients at what was looked up, (dim, dim); embeddings only.
        across: Second moment of the gradients at the outputs, (out, out), where it was asked for.
        tokens: Number of tokens in the batches, once for each draw.
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
        """What rounding needs later, without the moments that costing alone uses."""
        if self.columns is not None:
            return self
        return Factors(across=self.across, tokens=self.tokens)

    def arrays(self) -> dict[str, mx.array]:
        """Those that there are, by name."""
        return {name: part for name, part in vars(self).items() if isinstance(part, mx.array)}

    def cost(self, error: mx.array, forms: "Forms | None" = None) -> float:
        """KL in nats per token that an error ``(..., out, in)`` in the weight adds.

        Args:
            error: What a packing changes, in float32.
            forms: What stands for the moments, see `reduced` and `residuals`; None for themselves.
        """
        total = mx.array(0.0)
        if self.inputs is not None and self.outputs is not None:
            outputs = self.outputs
            if self.uses is not None:
                energy = (mx.square(error) @ self.inputs[..., None])[..., 0]
                # Means over each expert's own tokens.
                energy = energy * (self.tokens / mx.maximum(self.uses, 1))[:, None]
            elif forms is not None and forms.inputs is not None:
                energy = forms.inputs.energy(error)
                outputs = outputs if forms.outputs is None else forms.outputs
            else:
                energy = ((error @ self.inputs) * error).sum(axis=-1)
            total = total + (outputs * energy).sum()
        if self.lookups is not None and self.columns is not None:
            if forms is not None and forms.columns is not None:
                energy = forms.columns.energy(error)
            else:
                energy = ((error @ self.columns) * error).sum(axis=-1)
            total = total + (self.lookups * energy).sum()
        # Both factors are sums over tokens, and the divergence is a mean of their products.
        return 0.5 * float(total) / max(self.tokens, 1) ** 2

    def reduced(self) -> "Forms":
        """The moments in little."""
        inputs = None if self.inputs is None or self.uses is not None else leading(self.inputs)
        return Forms(inputs, None, None if self.columns is None else leading(self.columns))

    def residuals(self) -> "Forms":
        """What error feedback along both sides leaves of the moments."""
        if self.uses is not None:
            return Forms()
        parts = (self.inputs, self.across, self.columns)
        inputs, across, columns = (None if part is None else residual(part) for part in parts)
        return Forms(inputs, None if across is None else across.diagonal, columns)

    def add(
        self, use: Use, gradient: mx.array, shape: tuple[int, ...], *, across: bool = False
    ) -> None:
        """Add one use of a weight of this shape, with the gradient at its outputs.

        Stacked weights that take no expert indices (one matrix per head) are not factored.
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
        mx.eval(self.arrays())


@dataclass(frozen=True)
class Forms:
    """What stands for a tensor's moments, each in its own units; None where there is none.

    Attributes:
        inputs: Of the inputs.
        outputs: Squared gradients at the outputs, (out,), where they are not the factors' own.
        columns: Of the gradients at what was looked up.
    """

    inputs: Reduced | None = None
    outputs: mx.array | None = None
    columns: Reduced | None = None


def _plus(total: mx.array | None, more: mx.array) -> mx.array:
    return more if total is None else total + more
