"""Second moments of inputs and output gradients: a factored Fisher information per tensor.

With labels drawn from the model itself, the expected outer product of the gradient is the Hessian
of KL(reference || model) at the reference (Martens, arXiv 1412.1193). For one layer it factors into
the second moments of its inputs and of the gradients at its outputs (K-FAC, Martens and Grosse,
arXiv 1503.05671); of the latter costing needs the diagonal only, rounding uses it whole.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .blocks import Recording, arrays, decoder_layers, joined, record, with_arrays
from .packing import quantizable
from .taps import Use, tapped


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
        tokens: Number of tokens in the batches, once for each draw of labels.
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

    def cost(self, error: mx.array, left: "Residual | None" = None) -> float:
        """KL in nats per token that an error ``(..., out, in)`` in the weight adds.

        Args:
            error: What a packing changes, in float32.
            left: What error feedback leaves of the moments, see `residuals`; None without it.
        """
        total = mx.array(0.0)
        if self.inputs is not None and self.outputs is not None:
            outputs = self.outputs
            if self.uses is not None:
                energy = (mx.square(error) @ self.inputs[..., None])[..., 0]
                # Means over each expert's own tokens.
                energy = energy * (self.tokens / mx.maximum(self.uses, 1))[:, None]
            elif left is not None and left.inputs is not None:
                energy = mx.square(error) @ left.inputs
                outputs = outputs if left.outputs is None else left.outputs
            else:
                energy = ((error @ self.inputs) * error).sum(axis=-1)
            total = total + (outputs * energy).sum()
        if self.lookups is not None and self.columns is not None:
            if left is not None and left.columns is not None:
                energy = mx.square(error) @ left.columns
            else:
                energy = ((error @ self.columns) * error).sum(axis=-1)
            total = total + (self.lookups * energy).sum()
        # Both factors are sums over tokens, and the divergence is a mean of their products.
        return 0.5 * float(total) / max(self.tokens, 1) ** 2

    def residuals(self) -> "Residual":
        """What error feedback along both sides leaves of the moments."""
        if self.uses is not None:
            return Residual()
        parts = (self.inputs, self.across, self.columns)
        return Residual(*(None if part is None else residual(part) for part in parts))

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
        mx.eval([a for a in vars(self).values() if isinstance(a, mx.array)])


@dataclass(frozen=True)
class Residual:
    """Diagonals in place of moments, each in the units of its moment; None where there is none."""

    inputs: mx.array | None = None
    outputs: mx.array | None = None
    columns: mx.array | None = None


def _plus(total: mx.array | None, more: mx.array) -> mx.array:
    return more if total is None else total + more


def residual(moment: mx.array, damping: float = 0.02) -> mx.array:
    """What error feedback leaves of each input's second moment.

    With ``H = U^T D U`` and ``U`` unit upper triangular in the order of rounding, feedback leaves
    an error of ``tr(D noise)`` (QuIP, Chee et al., arXiv 2307.13304).

    Args:
        moment: (in, in), symmetric.
        damping: Share of the mean diagonal that is added to the diagonal.

    Returns:
        The diagonal of ``D``, (in,).
    """
    damped = moment + damping * mx.mean(mx.diag(moment)) * mx.eye(moment.shape[0])
    with mx.stream(mx.cpu):  # MLX factorises on the CPU only
        lower = mx.linalg.cholesky(damped[::-1, ::-1])
    return mx.square(mx.diag(lower))[::-1]


def score(logits: mx.array, key: mx.array) -> mx.array:
    """Gradient of the negative log-likelihood of tokens drawn from the model, in its logits.

    Args:
        logits: (batch, length, vocabulary).
        key: For the draw.

    Returns:
        Of the same shape and dtype.
    """
    logits32 = logits.astype(mx.float32)
    drawn = mx.random.categorical(logits32, key=key)
    hot = drawn[..., None] == mx.arange(logits.shape[-1])
    return (mx.softmax(logits32, axis=-1) - hot).astype(logits.dtype)


def factors(
    model: nn.Module,
    batches: list[mx.array],
    each: Callable[[], object] = lambda: None,
    *,
    draws: int = 1,
    across: Collection[str] = (),
) -> dict[str, Factors]:
    """Measure the factors of every quantizable tensor with one backward pass a batch.

    The decoder layers' inputs are stored and one layer at a time is run again and differentiated,
    so that memory holds the model, the hidden states and one layer's activations. A model whose
    layers cannot be replayed is differentiated as a whole, one window at a time.

    Args:
        model: An mlx-lm model; left as it was.
        batches: Token batches, int32 (batch, length).
        each: Called after each batch.
        draws: How often labels are drawn and differentiated per batch.
        across: Paths whose whole output moment is wanted.
    """
    modules = dict(quantizable(model))
    found = {path: Factors() for path in modules}
    training = getattr(model, "training", False)  # recurrent_gemma skips nn.Module's set-up
    model.train()  # where a fused kernel has no gradient, mlx-lm trains without it
    try:
        for number, tokens in enumerate(batches):
            logits, recording = record(model, tokens)
            for draw in range(draws):
                cotangent = score(logits, mx.random.key(number * draws + draw))
                for factor in found.values():
                    factor.tokens += tokens.size
                if recording:
                    _by_layer(model, modules, tokens, recording, cotangent, found, across)
                    continue
                for window, pulled in zip(tokens[:, None], cotangent[:, None], strict=True):
                    _gather(modules, lambda t=window: [model(t)], [], [pulled], found, across)
            each()
    finally:
        model.train(training)
    return found


def _by_layer(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    tokens: mx.array,
    recording: Recording,
    cotangent: mx.array,
    found: dict[str, Factors],
    across: Collection[str],
) -> None:
    inside = {id(m): i for i, layer in enumerate(decoder_layers(model)) for m in layer.modules()}
    # Gradients at the arrays that each call was handed, from the last call to the first.
    pulled: list[list[mx.array]] = [[] for _ in recording]
    for number in reversed(range(len(recording))):
        call, layer = recording[number], decoder_layers(model)[recording[number].index]

        def after(*outputs: mx.array, number=number) -> list[mx.array]:
            handed, logits = joined(model, tokens, recording, {number: list(outputs)})
            return [logits, *_flat(handed[number + 1 :])]

        def run(*inputs: mx.array, layer=layer, call=call) -> list[mx.array]:
            args, kwargs = with_arrays((call.args, call.kwargs), list(inputs))
            return [array + 0 for array in arrays(layer(*args, **kwargs))]

        later = [cotangent, *_flat(pulled[number + 1 :])]
        _, gradients = mx.vjp(after, arrays(call.output), later)
        own = {path: m for path, m in modules.items() if inside.get(id(m)) == call.index}
        inputs = arrays((call.args, call.kwargs))
        pulled[number] = _gather(own, run, inputs, gradients, found, across)

    def around() -> list[mx.array]:
        handed, logits = joined(model, tokens, recording, {})
        return [logits, *_flat(handed)]

    outer = {path: m for path, m in modules.items() if id(m) not in inside}
    _gather(outer, around, [], [cotangent, *_flat(pulled)], found, across)


def _flat(lists: Iterable[list[mx.array]]) -> list[mx.array]:
    return [array for part in lists for array in part]


def _gather(
    modules: Mapping[str, nn.Module],
    run: Callable[..., list[mx.array]],
    inputs: list[mx.array],
    cotangents: list[mx.array],
    found: dict[str, Factors],
    across: Collection[str],
) -> list[mx.array]:
    """Differentiate one stretch, add what its layers saw, and return the gradients at its inputs.

    Args:
        modules: Layer path -> quantizable layer of this stretch.
        run: Computes the stretch.
        inputs: What ``run`` takes.
        cotangents: Gradients at what ``run`` returns.
        found: Is added to.
        across: Paths whose whole output moment is wanted.
    """
    uses: list[Use] = []

    def see(use: Use) -> mx.array:
        uses.append(use)
        return use.outputs

    with tapped(modules, see):
        run(*inputs)  # only traced, for the shapes: nothing of it is evaluated
    if not uses and not inputs:
        return []

    def probed(*primals: mx.array) -> list[mx.array]:
        again: list[Use] = []
        given, offsets = primals[: len(inputs)], primals[len(inputs) :]

        def shift(use: Use) -> mx.array:
            again.append(use)
            return use.outputs + offsets[len(again) - 1]

        with tapped(modules, shift):
            results = run(*given)
        return [*results, *(use.inputs for use in again if not use.lookup)]

    offsets = [mx.zeros(use.outputs.shape, use.outputs.dtype) for use in uses]
    seen = [use.inputs for use in uses if not use.lookup]
    zeros = [mx.zeros(i.shape, i.dtype) for i in seen]
    values, gradients = mx.vjp(probed, [*inputs, *offsets], [*cotangents, *zeros])
    products = iter(values[len(cotangents) :])
    for use, gradient in zip(uses, gradients[len(inputs) :], strict=True):
        met = use if use.lookup else Use(use.path, next(products), use.indices, gradient)
        # A layer that also runs elsewhere, out of this stretch's reach, shows no gradient here;
        # where gradients overflow, the tensor is better measured directly.
        if 0 < float(mx.abs(gradient.astype(mx.float32)).sum()) < math.inf:
            shape = tuple(modules[use.path]["weight"].shape)
            found[use.path].add(met, gradient, shape, across=use.path in across)
    mx.eval(gradients[: len(inputs)])
    return gradients[: len(inputs)]
