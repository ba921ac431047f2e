"""Layers with adapters on top. The base layer inside is never changed.

``y + (x @ a) @ b`` with the scale in ``b``, in the order of mlx-lm's LoRA layers. The sum has the
dtype of the base layer's output.
"""

from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import UnsupportedError
from ..lora.geometry import EMBEDDING, EXPERTS
from .activation import Route, Slot
from .stack import Stack, Stacks, gather

#: Linear layers that sum over the ranks, and all linear layers that are split over ranks.
REDUCED = (nn.ShardedToAllLinear, nn.QuantizedShardedToAllLinear)
SPLIT = (*REDUCED, nn.AllToShardedLinear, nn.QuantizedAllToShardedLinear)

#: The experts that the tokens of the running block go to, (rows, tokens, experts a token).
_routed: ContextVar[mx.array | None] = ContextVar("mlx_optiq_ext_experts", default=None)


class _Mounted(nn.Module):
    """A module that replaces another and forwards to it all that it does not change."""

    _base: str

    def __getattr__(self, key: str) -> Any:
        if key in self:
            return self[key]
        if self._base not in self:
            raise AttributeError(key)
        return getattr(self[self._base], key)


class MountedLoRALinear(_Mounted):
    """A linear layer, quantized or not, with adapters.

    Attributes:
        linear: The base layer.
        mounted: The layer's adapters.
    """

    _base = "linear"

    def __init__(self, linear: nn.Module, mounted: Stacks):
        super().__init__()
        self.linear = linear
        self.mounted = mounted

    def __call__(self, x: mx.array) -> mx.array:
        """Map (..., in) to (..., out)."""
        return self.adapted(x, self.linear(x))

    def adapted(self, x: mx.array, y: mx.array) -> mx.array:
        """The base layer's output for ``x`` with the adapters' updates."""
        for stack, at in self.mounted.chosen():
            if isinstance(at, Slot):
                z = at.scaled((x @ stack.a[at.index]) @ stack.b[at.index], y.dtype)
            else:
                z = _by_rows(x, stack.a, stack.b, at, y.dtype)
            y = y + z
        return y


class ReducedLoRALinear(MountedLoRALinear):
    """A linear layer whose inputs are split over ranks, with adapters split the same way.

    The base layer's output and the updates are summed over the ranks together.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """Map this rank's part of (..., in) to the whole (..., out)."""
        base: Any = self.linear
        y = mx.distributed.all_sum(self.adapted(x, _product(base, x)), group=base.group)
        return y + base["bias"] if "bias" in base else y


class MountedLoRASwitchLinear(_Mounted):
    """A stack of experts with adapters.

    Attributes:
        linear: The base layer.
        mounted: The layer's adapters.
    """

    _base = "linear"

    def __init__(self, linear: nn.Module, mounted: Stacks):
        super().__init__()
        self.linear = linear
        self.mounted = mounted

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Map (..., 1, in) to (..., 1, out); ``indices``, (...), are the experts."""
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        for stack, at in self.mounted.chosen():
            y = y + _experts(x, stack, at, indices, sorted_indices, y.dtype)
        return y


class MountedLoRAEmbedding(_Mounted):
    """An embedding with adapters, which may be the head too.

    Attributes:
        embedding: The base layer.
        mounted: The layer's adapters.
    """

    _base = "embedding"

    def __init__(self, embedding: nn.Module, mounted: Stacks):
        super().__init__()
        self.embedding = embedding
        self.mounted = mounted

    def __call__(self, x: mx.array) -> mx.array:
        """Map tokens, (...), to (..., dims)."""
        y = self.embedding(x)
        for stack, at in self.mounted.chosen():
            if isinstance(at, Slot):
                z = at.scaled(stack.a[at.index][x] @ stack.b[at.index], y.dtype)
            else:
                rows = at.by_row(x[..., None])[..., 0]
                first = at.slots[:, None] * stack.a.shape[1]
                z = at.masked(stack.a.reshape(-1, stack.rank)[first + rows])
                z = at.scaled(gather(z, stack.b, at.slots), y.dtype).reshape(y.shape)
            y = y + z
        return y

    def as_linear(self, x: mx.array) -> mx.array:
        """The embedding as the head of the model."""
        base: Any = self.embedding
        y = base.as_linear(x)
        for stack, at in self.mounted.chosen():
            if isinstance(at, Slot):
                # Sliced first: MLX before 0.32 slices a transposed stack of one wrongly.
                z = at.scaled((x @ stack.b[at.index].T) @ stack.a[at.index].T, y.dtype)
            else:
                z = _by_rows(x, stack.b, stack.a, at, y.dtype, transpose=True)
            y = y + z
        return y


class MountedExperts(_Mounted):
    """A block of experts that tells its layers to which row each token belongs.

    For many tokens the block sorts them by expert before it calls its layers.

    Attributes:
        experts: The block.
    """

    _base = "experts"

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def __call__(self, x: mx.array, indices: mx.array, *args: Any, **kwargs: Any) -> Any:
        """The block's output for ``x``, with the experts in ``indices``."""
        token = _routed.set(indices)
        try:
            return self.experts(x, indices, *args, **kwargs)
        finally:
            _routed.reset(token)


def mounted_layer(module: nn.Module, kind: str, mounted: Stacks) -> nn.Module:
    """The layer that takes a module's place; ``kind`` is that of `lora.geometry`."""
    if kind == EMBEDDING:
        return MountedLoRAEmbedding(module, mounted)
    if kind == EXPERTS:
        return MountedLoRASwitchLinear(module, mounted)
    return (ReducedLoRALinear if isinstance(module, REDUCED) else MountedLoRALinear)(
        module, mounted
    )


def _product(base: Any, x: mx.array) -> mx.array:
    """The product that a layer of `REDUCED` sums over the ranks."""
    if "scales" not in base:
        return x @ base["weight"].T
    return mx.quantized_matmul(
        x,
        base["weight"],
        scales=base["scales"],
        biases=base.get("biases"),
        transpose=True,
        group_size=base.group_size,
        bits=base.bits,
        mode=getattr(base, "mode", "affine"),
    )


def _by_rows(
    x: mx.array, a: mx.array, b: mx.array, at: Route, dtype: mx.Dtype, *, transpose: bool = False
) -> mx.array:
    z = at.masked(gather(at.by_row(x), a, at.slots, transpose=transpose))
    z = at.scaled(gather(z, b, at.slots, transpose=transpose), dtype)
    return z.reshape(*x.shape[:-1], -1)


def _experts(
    x: mx.array,
    stack: Stack,
    at: Slot | Route,
    indices: mx.array,
    is_sorted: bool,
    dtype: mx.Dtype,
) -> mx.array:
    """The update of (..., 1, in), whose leading dimensions are those of ``indices``."""
    if isinstance(at, Slot):
        z = gather(gather(x, stack.a[at.index], indices), stack.b[at.index], indices)
        return at.scaled(z, dtype)
    a, b = (each.reshape(-1, *each.shape[2:]) for each in (stack.a, stack.b))
    row = _row_of(indices, at.rows, is_sorted)
    slots = at.slots[row] * stack.a.shape[1] + indices.astype(mx.uint32)
    return at.scaled(gather(at.masked(gather(x, a, slots), row), b, slots), dtype, row)


def _row_of(indices: mx.array, rows: int, is_sorted: bool) -> mx.array:
    """The row of the batch that each entry of ``indices`` belongs to."""
    routed = _routed.get() if is_sorted else indices
    if routed is None or routed.size % rows or routed.size != indices.size:
        raise UnsupportedError(
            "the experts of this model hide which row a token is of: it cannot mix adapters in one "
            "batch"
        )
    row = mx.arange(routed.size, dtype=mx.uint32) // (routed.size // rows)
    if is_sorted:
        row = row[mx.argsort(routed.flatten())]  # as mlx-lm's block sorted them
    return row.reshape(indices.shape)
