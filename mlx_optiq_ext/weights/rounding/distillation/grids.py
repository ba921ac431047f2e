"""A quantized tensor while its codes, scales and biases move."""

from dataclasses import dataclass

import mlx.core as mx

from ...precision import Precision
from ..codes import pack

#: Parts of a step that a moving weight's place is kept in, as a power of two.
PARTS = 8
#: The largest move of a code in one update, in steps of its grid.
FARTHEST = 0.5

#: Arrays by name.
State = dict[str, mx.array]
Quantized = tuple[mx.array, ...]


@dataclass(frozen=True)
class Grid:
    """How one tensor is stored, and how its state is read.

    A grid's middle and its width move apart from each other, as bias and scale would not. Codes
    that move are kept as places in fixed point: 256ths of a step from the lower end of the lowest
    code's cell, two bytes a weight.

    Attributes:
        precision: Of the tensor.
        stored: Dtype of its scales and biases in the file.
        dtype: Dtype to compute in.
        moves: Whether its codes move.
    """

    precision: Precision
    stored: mx.Dtype
    dtype: mx.Dtype
    moves: bool

    def start(self, quantized: Quantized, weight: mx.array, anchor: float) -> State:
        """The state that stands for what is stored now.

        Args:
            quantized: Words, scales and biases.
            weight: The unquantized weight (..., out, in).
            anchor: As in `Settings`.

        Returns:
            ``codes`` uint8 (..., out, in), or places in uint16; ``scale`` and ``centre`` of each
            grid in float32 (..., out, groups); ``middle``, the code in the middle.
        """
        words, *grids = quantized
        scale, bias = (a.astype(mx.float32) for a in grids)
        middle = mx.array((2**self.precision.bits - 1) / 2)
        codes = mx.dequantize(
            words,
            mx.ones_like(scale),
            mx.zeros_like(scale),
            group_size=self.precision.group_size,
            bits=self.precision.bits,
        )
        state = {"scale": scale, "centre": bias + scale * middle, "middle": middle}
        if not self.moves:
            return {"codes": codes.astype(mx.uint8), **state}
        step = mx.where(scale == 0, 1, scale)[..., None]
        exact = self._flat((self._grouped(weight.astype(mx.float32)) - bias[..., None]) / step)
        off = anchor * mx.clip(exact - codes, -0.5, 0.5) * (1 << PARTS)
        off = mx.clip(mx.floor(off), -(1 << PARTS - 1), (1 << PARTS - 1) - 1)
        places = (codes + 0.5) * (1 << PARTS) + off
        return {"codes": places.astype(mx.uint16), **state}

    def weight(self, state: State) -> mx.array:
        """What the file would stand for, (..., out, in) in the dtype to compute in."""
        scale, bias = (a.astype(mx.float32)[..., None] for a in self._file(state))
        grouped = self._grouped(self._codes(state).astype(mx.float32))
        return self._flat((grouped * scale + bias).astype(self.dtype))

    def gradients(self, state: State, gradient: mx.array) -> State:
        """Gradients of the state from those of the weight (..., out, in).

        Returns:
            Those of ``scale`` and ``centre`` in units in which one rate suits every grid: the
            width's half in scales, and the middle in scales. That of ``codes`` in steps, if they
            move: rounding is taken for the identity (straight-through estimation).
        """
        unit = mx.abs(state["scale"])
        slope = self._grouped(gradient.astype(mx.float32))
        grouped = self._grouped(self._codes(state).astype(mx.float32)) - state["middle"]
        found = {
            "scale": (slope * grouped).sum(axis=-1) * unit / state["middle"],
            "centre": slope.sum(axis=-1) * unit,
        }
        if self.moves:
            found["codes"] = self._flat(slope * state["scale"][..., None])
        return found

    def moved(self, state: State, moves: State, key: mx.array) -> State:
        """The state after an update.

        Args:
            state: Before it.
            moves: What to take off, in the units of `gradients`.
            key: For stochastic rounding.
        """
        unit = mx.abs(state["scale"])
        new = {
            "scale": state["scale"] - moves["scale"] * unit / state["middle"],
            "centre": state["centre"] - moves["centre"] * unit,
        }
        if self.moves:
            noise = mx.random.uniform(shape=state["codes"].shape, dtype=mx.float16, key=key)
            move = mx.clip(moves["codes"], -FARTHEST, FARTHEST) * (1 << PARTS)
            move = mx.floor(move + noise.astype(mx.float32)).astype(mx.int32)
            highest = ((2 * state["middle"] + 1) * (1 << PARTS) - 1).astype(mx.int32)
            places = mx.minimum(mx.maximum(state["codes"].astype(mx.int32) - move, 0), highest)
            new["codes"] = places.astype(mx.uint16)
        return {**state, **new}

    def quantized(self, state: State) -> Quantized:
        """What to store: words, scales and biases."""
        scale, bias = self._file(state)
        return pack(self._codes(state), self.precision.bits), scale, bias

    def _codes(self, state: State) -> mx.array:
        return mx.right_shift(state["codes"], PARTS) if self.moves else state["codes"]

    def _file(self, state: State) -> tuple[mx.array, mx.array]:
        """Scales and biases as stored; the bias makes up for the scale's rounding."""
        scale = state["scale"].astype(self.stored)
        bias = state["centre"] - scale.astype(mx.float32) * state["middle"]
        return scale, bias.astype(self.stored)

    def _grouped(self, array: mx.array) -> mx.array:
        return mx.unflatten(array, -1, (-1, self.precision.group_size))

    @staticmethod
    def _flat(array: mx.array) -> mx.array:
        return array.flatten(-2, -1)


@dataclass(frozen=True)
class Parameter:
    """An unquantized parameter that moves, such as a norm's weight or a layer's bias.

    Attributes:
        stored: Its dtype in the file.
        dtype: Dtype to compute in.
    """

    stored: mx.Dtype
    dtype: mx.Dtype

    def start(self, value: mx.array) -> State:
        """The state: its value and the unit of its moves, in float32."""
        # A sum is an array of its own: a compiled step cannot take what it finds in the model too.
        value = value.astype(mx.float32) + 0
        # An element of no size moves with its neighbours, a large one as a share of itself.
        unit = mx.abs(value) + 0.1 * mx.sqrt(mx.mean(mx.square(value))) + 1e-8
        return {"value": value, "unit": unit}

    def weight(self, state: State) -> mx.array:
        """Its value, rounded as in the file, in the dtype to compute in."""
        return state["value"].astype(self.stored).astype(self.dtype)

    def gradients(self, state: State, gradient: mx.array) -> State:
        """The gradient in units of its moves."""
        return {"value": gradient.astype(mx.float32) * state["unit"]}

    def moved(self, state: State, moves: State, key: mx.array) -> State:
        """The state after an update; see `Grid.moved`."""
        return {**state, "value": state["value"] - moves["value"] * state["unit"]}
