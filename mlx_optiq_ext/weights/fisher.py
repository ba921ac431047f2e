"""Second moments of inputs and output gradients: a factored Fisher information per tensor.

With labels drawn from the model itself, the expected outer product of the gradient is the Hessian
of KL(reference || model) at the reference (Martens, arXiv 1412.1193). For one layer it factors into
the second moments of its inputs and of the gradients at its outputs (K-FAC, Martens and Grosse,
arXiv 1503.05671); of the latter only the diagonal is kept.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .blocks import Recording, chained, decoder_layers, finish, front, record
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
        columns: Squared gradients at what was looked up, (dim,); embeddings only.
        tokens: Number of tokens in the batches.
    """

    inputs: mx.array | None = None
    outputs: mx.array | None = None
    uses: mx.array | None = None
    lookups: mx.array | None = None
    columns: mx.array | None = None
    tokens: int = 0

    @property
    def seen(self) -> bool:
        """Whether any gradient reached the tensor."""
        return self.inputs is not None or self.columns is not None

    def cost(self, error: mx.array, left: mx.array | None = None) -> float:
        """KL in nats per token that an error ``(..., out, in)`` in the weight adds.

        Args:
            error: What a packing changes, in float32.
            left: Diagonal (in,) in place of the inputs' second moment, in its units: what error
                feedback leaves of it, see `residual`.
        """
        total = mx.array(0.0)
        if self.inputs is not None and self.outputs is not None:
            if self.uses is not None:
                energy = (mx.square(error) @ self.inputs[..., None])[..., 0]
                # Means over each expert's own tokens.
                energy = energy * (self.tokens / mx.maximum(self.uses, 1))[:, None]
            elif left is not None:
                energy = mx.square(error) @ left
            else:
                energy = ((error @ self.inputs) * error).sum(axis=-1)
            total = total + (self.outputs * energy).sum()
        if self.lookups is not None and self.columns is not None:
            total = total + (self.lookups * (mx.square(error) @ self.columns)).sum()
        # Both factors are sums over tokens, and the divergence is a mean of their products.
        return 0.5 * float(total) / max(self.tokens, 1) ** 2

    def add(self, use: Use, gradient: mx.array, shape: tuple[int, ...]) -> None:
        """Add one use of a weight of this shape, with the gradient at its outputs.

        Stacked weights that take no expert indices (one matrix per head) are not factored.
        """
        squares = mx.square(gradient.astype(mx.float32)).reshape(-1, gradient.shape[-1])
        if use.lookup:
            counts = mx.zeros(shape[:1]).at[use.inputs.reshape(-1)].add(1.0)
            self.lookups = _plus(self.lookups, counts)
            self.columns = _plus(self.columns, squares.sum(axis=0))
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
        mx.eval([a for a in vars(self).values() if isinstance(a, mx.array)])


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
    model: nn.Module, batches: list[mx.array], each: Callable[[], object] = lambda: None
) -> dict[str, Factors]:
    """Measure the factors of every quantizable tensor with one backward pass a batch.

    The decoder layers' inputs are stored and one layer at a time is run again and differentiated,
    so that memory holds the model, the hidden states and one layer's activations. A model whose
    layers do not pass a hidden state on plainly is differentiated as a whole.

    Args:
        model: An mlx-lm model; left as it was.
        batches: Token batches, int32 (batch, length).
        each: Called after each batch.
    """
    modules = dict(quantizable(model))
    found = {path: Factors() for path in modules}
    training = model.training
    model.train()  # where a fused kernel has no gradient, mlx-lm trains without it
    try:
        for number, tokens in enumerate(batches):
            logits, recording = record(model, tokens)
            cotangent = score(logits, mx.random.key(number))
            for factor in found.values():
                factor.tokens += tokens.size
            if chained(recording):
                _by_layer(model, modules, tokens, recording, cotangent, found)
            else:
                _gather(modules, lambda _, t=tokens: model(t), None, cotangent, found)
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
) -> None:
    layers = decoder_layers(model)
    inside = {id(m): i for i, layer in enumerate(layers) for m in layer.modules()}
    outer = {path: m for path, m in modules.items() if id(m) not in inside}
    last = recording[-1].hidden_out
    cotangent = _gather(
        outer, lambda h: finish(model, tokens, recording, h), last, cotangent, found
    )
    for index in reversed(range(len(layers))):
        layer, call = layers[index], recording[index]
        own = {path: m for path, m in modules.items() if inside.get(id(m)) == index}

        def run(hidden: mx.array, layer=layer, call=call) -> mx.array:
            output = layer(hidden, *call.args[1:], **call.kwargs)
            return output[0] if isinstance(output, tuple) else output

        cotangent = _gather(own, run, call.hidden, cotangent, found)
    _gather(outer, lambda _: front(model, tokens, recording), None, cotangent, found)


def _gather(
    modules: Mapping[str, nn.Module],
    run: Callable[[mx.array], mx.array],
    hidden: mx.array | None,
    cotangent: mx.array,
    found: dict[str, Factors],
) -> mx.array:
    """Differentiate one stretch, add what its layers saw, and return the gradient in ``hidden``."""
    start = mx.zeros((1,)) if hidden is None else hidden
    uses: list[Use] = []

    def see(use: Use) -> mx.array:
        uses.append(use)
        return use.outputs

    with tapped(modules, see):
        run(start)  # only traced, for the shapes: nothing of it is evaluated
    shapes = [(use.outputs.shape, use.outputs.dtype) for use in uses]

    def probed(start: mx.array, *offsets: mx.array) -> list[mx.array]:
        again: list[Use] = []

        def shift(use: Use) -> mx.array:
            again.append(use)
            return use.outputs + offsets[len(again) - 1]

        with tapped(modules, shift):
            result = run(start)
        return [result, *(use.inputs for use in again if not use.lookup)]

    offsets = [mx.zeros(shape, dtype) for shape, dtype in shapes]
    inputs = [use.inputs for use in uses if not use.lookup]
    zeros = [mx.zeros(i.shape, i.dtype) for i in inputs]
    values, gradients = mx.vjp(probed, [start, *offsets], [cotangent, *zeros])
    seen = iter(values[1:])
    for use, gradient in zip(uses, gradients[1:], strict=True):
        met = use if use.lookup else Use(use.path, next(seen), use.indices, gradient)
        # A layer that also runs elsewhere, out of this stretch's reach, shows no gradient here.
        if bool(mx.any(gradient != 0)):
            found[use.path].add(met, gradient, tuple(modules[use.path].weight.shape))
    mx.eval(gradients[0])
    return gradients[0]
