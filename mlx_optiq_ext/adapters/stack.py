"""One layer's adapters, stacked by rank, and the products with them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from ..lora import LayerAdapter
from .activation import Route, Rows, Slot, active, resolved, slots_of
from .mixture import MountedAdapter

#: Ranks share a stack if padding the smaller one takes at most this much.
PADDING = 1.1


@dataclass(frozen=True, eq=False)
class Stack:
    """Adapters of one layer with similar ranks, padded to the largest.

    Attributes:
        a: (slots, in, rank); (slots, experts, in, rank); for an embedding (slots, rows, rank).
        b: (slots, rank, out); (slots, experts, rank, out); for an embedding (slots, rank, dims).
            Scales are folded in.
        members: Slot -> adapter.
    """

    a: mx.array
    b: mx.array
    members: tuple[MountedAdapter, ...]

    @cached_property
    def slots(self) -> Mapping[MountedAdapter, int]:
        """The slot of each adapter."""
        return {adapter: slot for slot, adapter in enumerate(self.members)}

    @property
    def rank(self) -> int:
        """LoRA rank of the stack: the largest of its adapters'."""
        return self.a.shape[-1]

    @property
    def dtypes(self) -> tuple[mx.Dtype, mx.Dtype]:
        """Dtypes of ``a`` and ``b``."""
        return self.a.dtype, self.b.dtype


def single(adapter: MountedAdapter, layer: LayerAdapter) -> Stack:
    """A stack of one adapter."""
    a, b = layer.a, layer.b
    if layer.stacked:
        a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
    b = (b.astype(mx.float32) * layer.scale).astype(b.dtype)
    return Stack(mx.contiguous(a)[None], mx.contiguous(b)[None], (adapter,))


def added(stacks: tuple[Stack, ...], new: Stack) -> tuple[Stack, ...]:
    """Stacks with one more adapter, added to a stack of similar rank if there is one. Lazy."""
    for index, stack in enumerate(stacks):
        low, high = sorted((stack.rank, new.rank))
        if stack.dtypes == new.dtypes and high <= PADDING * low:
            parts = _padded(stack, high), _padded(new, high)
            joined = Stack(
                mx.concatenate([part.a for part in parts]),
                mx.concatenate([part.b for part in parts]),
                stack.members + new.members,
            )
            return (*stacks[:index], joined, *stacks[index + 1 :])
    return (*stacks, new)


def removed(stacks: tuple[Stack, ...], adapter: MountedAdapter) -> tuple[Stack, ...]:
    """Stacks without an adapter. Lazy."""
    rest = []
    for stack in stacks:
        if adapter not in stack.slots:
            rest.append(stack)
        elif len(stack.members) > 1:
            keep = mx.array([slot for each, slot in stack.slots.items() if each is not adapter])
            members = tuple(each for each in stack.members if each is not adapter)
            rest.append(Stack(stack.a[keep], stack.b[keep], members))
    return tuple(rest)


def _padded(stack: Stack, rank: int) -> Stack:
    more = rank - stack.rank
    if not more:
        return stack
    wide = [(0, 0)] * stack.a.ndim
    a = mx.pad(stack.a, [*wide[:-1], (0, more)])
    b = mx.pad(stack.b, [*wide[:-2], (0, more), (0, 0)])
    return Stack(a, b, stack.members)


class Stacks:
    """The adapters of one layer, read by its module and replaced as a whole.

    Attributes:
        names: The model's adapters by name.
        stacks: Stacks of different LoRA ranks.
    """

    def __init__(self, names: Mapping[str, MountedAdapter]):
        self.names = names
        self.stacks: tuple[Stack, ...] = ()

    def chosen(self) -> Iterator[tuple[Stack, Slot | Route]]:
        """The stacks that the running code uses, each with a slot for all rows or for each row.

        A stack comes once for each of its adapters in a sum.
        """
        selection = resolved(active(), self.names)
        if selection is None:
            return
        for stack in self.stacks:
            if isinstance(selection, Rows):
                found = selection.routes(stack.members)
            else:
                found = slots_of(selection, stack.slots)
            for at in found:
                yield stack, at


def gather(x: mx.array, stack: mx.array, slots: mx.array, *, transpose: bool = False) -> mx.array:
    """``x[i] @ stack[slots[i]]`` for every ``i``.

    Args:
        x: (..., m, in), where the leading dimensions are those of ``slots`` or broadcast to them.
        stack: (count, in, out); (count, out, in) with ``transpose``.
        slots: Whole numbers below ``count``.
        transpose: Whether to transpose the matrices of the stack.

    Returns:
        (*slots.shape, m, out), in the wider dtype.
    """
    everywhere = stack.dtype == mx.float32
    if everywhere or (stack.dtype == x.dtype and mx.default_device() == mx.gpu):
        x = x.astype(stack.dtype)
        return mx.gather_mm(x, stack.swapaxes(-1, -2) if transpose else stack, rhs_indices=slots)
    # MLX gathers half precision on GPUs only, and would convert the whole stack otherwise.
    taken = stack[slots]
    return x @ (taken.swapaxes(-1, -2) if transpose else taken)
