"""A model whose stored values move: one step forward, backward and along the gradient."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ....model.layers import arrays, decoder_layers, layer_index, with_arrays
from ....model.taps import Use, tapped
from ....planning.parts import Parts
from .adam import moments, moves
from .divergence import chunked
from .grids import Grid, Parameter, State

#: What gradients are multiplied with: in float16 those of a mean over tokens would vanish. Updates
#: do not depend on it.
SCALE = 256.0

#: Parameter path -> its arrays.
States = dict[str, State]


@dataclass(frozen=True)
class Student:
    """A model with moving parameters; between calls it is as it was.

    Attributes:
        parts: The model.
        movable: Parameter path, such as ``model.norm.weight`` -> what moves there.
        checkpoint: Whether each layer's weights and activations are computed once more for the
            gradients instead of kept.
        fused: Whether what is done to each element runs as one kernel.
    """

    parts: Parts
    movable: dict[str, Grid | Parameter]
    checkpoint: bool
    fused: bool = False

    def weights(self, states: States, paths: list[str]) -> dict[str, mx.array]:
        """What some parameters are now."""
        return {path: _weight(self.movable[path], self.fused)(states[path]) for path in paths}

    def placed(self, weights: Mapping[str, mx.array]) -> AbstractContextManager[None]:
        """The model with other parameters while inside."""
        return placed(self.parts.model, weights)

    def layers(self) -> list[list[str]]:
        """Paths of what moves inside each decoder layer."""
        index = layer_index(self.parts.model)
        own: list[list[str]] = [[] for _ in decoder_layers(self.parts.model)]
        for path in self.movable:
            number = index.get(path.rpartition(".")[0])
            if number is not None:
                own[number].append(path)
        return own

    def outer(self) -> list[str]:
        """Paths of what moves outside of the decoder layers."""
        inside = {path for own in self.layers() for path in own}
        return [path for path in self.movable if path not in inside]

    def judged(self, states: States, tokens: mx.array, expected: mx.array) -> mx.array:
        """KL(reference || student) of a batch in nats a token.

        Args:
            states: Where the student stands.
            tokens: int32 (batch, length).
            expected: What the reference's layers return, (batch * length, dim).
        """
        outer = self.weights(states, self.outer())

        def layer(index: int, original: Any, args: tuple, kwargs: dict) -> Any:
            with self.placed(self.weights(states, own[index])):
                return original(*args, **kwargs)

        own = self.layers()
        with self.placed(outer):
            hidden = self.parts.body(tokens, layer)
        return self._divergence(outer, expected, hidden, gradients=False)[0]

    def moments(self, states: States) -> States:
        """Moments before the first step."""
        found = {}
        for path, one in self.movable.items():
            held = states[path]
            shape = (held["codes"] if isinstance(one, Grid) else held["value"]).shape
            gradients = one.gradients(held, mx.broadcast_to(mx.array(0.0), shape))
            found[path] = moments(gradients)
        return found

    def step(
        self,
        states: States,
        moments: States,
        tokens: mx.array,
        expected: mx.array,
        key: mx.array,
        rates: State,
        corrections: list[mx.array],
    ) -> tuple[States, States, mx.array]:
        """The states and moments after one update, and the KL before it.

        Args:
            states: Where the student stands.
            moments: From `moments`, or the step before.
            tokens: int32 (batch, length).
            expected: What the reference's layers return, (batch * length, dim).
            key: For stochastic rounding.
            rates: Name of a moving array -> its rate.
            corrections: Of the moments' means for their start at 0.
        """
        gradients, kl = self._gradients(states, tokens, expected)
        new_states, new_moments = {}, {}
        # The last layer first, whose gradient is there first: it need not be held.
        paths = list(reversed(self.movable))
        for path, own in zip(paths, mx.random.split(key, len(paths)), strict=True):
            update = _update(self.movable[path], self.fused)
            new_states[path], new_moments[path] = update(
                states[path], moments[path], gradients[path], rates, corrections, own
            )
        return new_states, new_moments, kl

    def _gradients(
        self, states: States, tokens: mx.array, expected: mx.array
    ) -> tuple[dict[str, mx.array], mx.array]:
        outer = self.outer()
        kept = outer if self.checkpoint else list(self.movable)
        leaves = self.weights(states, kept)
        for path in self.movable:
            if path not in leaves:  # made inside its layer; a zero that is added takes its gradient
                one = self.movable[path]
                shape = states[path]["codes" if isinstance(one, Grid) else "value"].shape
                leaves[path] = mx.broadcast_to(mx.array(0, one.dtype), shape)

        def loss(leaves: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
            with self.placed({path: leaves[path] for path in kept}), self._looked_up():
                layer = self._recomputed(states, leaves) if self.checkpoint else None
                hidden = self.parts.body(tokens, layer)
            head = {path: mx.stop_gradient(leaves[path]) for path in outer}
            kl, own, rows = self._divergence(head, expected, mx.stop_gradient(hidden))
            # The head's gradients are there already: what has them as its own is backed through.
            total = (hidden * rows).sum().astype(mx.float32)
            for path, gradient in own.items():
                total = total + (leaves[path] * gradient).sum().astype(mx.float32)
            return total, kl

        (_, kl), gradients = mx.value_and_grad(loss)(leaves)
        return gradients, kl

    def _divergence(
        self,
        outer: dict[str, mx.array],
        expected: mx.array,
        hidden: mx.array,
        *,
        gradients: bool = True,
    ) -> tuple[mx.array, dict[str, mx.array], mx.array]:
        def head(weights: dict[str, mx.array], rows: mx.array) -> mx.array:
            with self.placed(weights):
                return self.parts.head(rows)

        tokens = self.parts.tokens
        how = {"gradients": gradients, "scale": SCALE}
        return chunked(self.parts.head, head, outer, expected, hidden, tokens, **how)

    def _recomputed(self, states: States, leaves: dict[str, mx.array]) -> Callable[..., Any]:
        """Calls of layers of which nothing is kept for the gradients but what came in."""
        own = self.layers()

        def layer(index: int, original: Any, args: tuple, kwargs: dict) -> Any:
            returned: list[Any] = []

            def run(
                leaves: dict[str, mx.array], states: States, given: list[mx.array]
            ) -> list[mx.array]:
                states = {
                    path: {name: mx.stop_gradient(a) for name, a in state.items()}
                    for path, state in states.items()
                }
                made = self.weights(states, own[index])
                with self.placed({path: made[path] + leaf for path, leaf in leaves.items()}):
                    new_args, new_kwargs = with_arrays((args, kwargs), given)
                    output = original(*new_args, **new_kwargs)
                returned.append(output)
                return arrays(output)

            mine = {path: leaves[path] for path in own[index]}
            held = {path: states[path] for path in own[index]}
            outputs = mx.checkpoint(run)(mine, held, arrays((args, kwargs)))
            return with_arrays(returned[0], outputs)

        return layer

    @contextmanager
    def _looked_up(self) -> Iterator[None]:
        """Embeddings whose gradient adds the tokens up in one order on every device."""
        modules = {
            path: module
            for path, module in self.parts.model.named_modules()
            if isinstance(module, nn.Embedding) and f"{path}.weight" in self.movable
        }

        def tap(use: Use) -> mx.array:
            if not use.lookup:
                return use.outputs
            return cast(mx.array, looked_up(modules[use.path].weight, use.inputs))

        with tapped(modules, tap):
            yield


@cache
def _weight(one: Grid | Parameter, fused: bool) -> Callable[[State], mx.array]:
    return mx.compile(one.weight) if fused else one.weight


@cache
def _update(one: Grid | Parameter, fused: bool) -> Callable[..., tuple[State, State]]:
    """What brings the state and moments of one parameter behind an update."""

    def update(
        state: State,
        moments: State,
        gradient: mx.array,
        rates: State,
        corrections: list[mx.array],
        key: mx.array,
    ) -> tuple[State, State]:
        found = one.gradients(state, gradient)
        taken, new_moments = moves(found, moments, rates, corrections)
        return one.moved(state, taken, key), new_moments

    return mx.compile(update) if fused else update


@contextmanager
def placed(model: nn.Module, parameters: Mapping[str, mx.array]) -> Iterator[None]:
    """A model with other parameters while inside, by parameter path."""
    modules = dict(model.named_modules())
    slots = [(modules[path.rpartition(".")[0]], path.rpartition(".")[2]) for path in parameters]
    before = [module[name] for module, name in slots]
    try:
        for (module, name), value in zip(slots, parameters.values(), strict=True):
            module[name] = value
        yield
    finally:
        for (module, name), value in zip(slots, before, strict=True):
            module[name] = value


@mx.custom_function
def looked_up(weight: mx.array, tokens: mx.array) -> mx.array:
    """Rows of a weight (vocabulary, dim) for tokens (...)."""
    return weight[tokens]


@looked_up.vjp
def _(primals, cotangent, _output):
    weight, tokens = primals
    order = mx.argsort(tokens.flatten())
    tokens, rows = tokens.flatten()[order], cotangent.reshape(-1, weight.shape[-1])[order]
    # Sums of runs as differences of one running sum, each written once: no atomic additions.
    total = mx.cumsum(rows.astype(mx.float32), axis=0)
    differs = tokens[1:] != tokens[:-1]
    edge = mx.array([True])
    first, last = mx.concatenate([edge, differs]), mx.concatenate([differs, edge])
    start = mx.cummax(mx.where(first, mx.arange(len(tokens)), 0))
    before = mx.where((start > 0)[:, None], total[mx.maximum(start - 1, 0)], 0)
    gradient = mx.zeros((len(weight) + 1, weight.shape[-1]), weight.dtype)
    gradient[mx.where(last, tokens, len(weight))] = (total - before).astype(weight.dtype)
    return gradient[:-1], mx.zeros_like(primals[1])
