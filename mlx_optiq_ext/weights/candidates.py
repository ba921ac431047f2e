"""The tensors of a model that can be quantized, each with its candidate precisions."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import BudgetError
from ..model.layers import leaves, quantizable
from ..planning.budget import BPW, SIZE, Budget, size_text
from .file_size import NOTHING, FileSize
from .precision import BITS, GROUP_SIZES, Precision


@dataclass(frozen=True)
class Tensor:
    """A weight that can be quantized.

    Attributes:
        path: Layer path of its module, such as ``model.layers.0.self_attn.q_proj``.
        shape: Unpacked shape ``(..., out, in)``.
        dtype_bits: Width of its dtype.
        precisions: The candidates, by rising stored bits.
        own: The precision that the model's own ``quant_predicate`` asks for, or None. If its group
            size does not divide the last axis, the lowest precision that honours it.
        pinned: Whether the user has chosen the candidates, so that ``own`` is none of them.
    """

    path: str
    shape: tuple[int, ...]
    dtype_bits: int
    precisions: tuple[Precision, ...]
    own: Precision | None = None
    pinned: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def stored_bits(self, precision: Precision) -> int:
        """Bits in the file under one precision."""
        return precision.stored_bits(self.shape, self.dtype_bits)

    @property
    def unquantized(self) -> Precision:
        """The unquantized precision of this weight."""
        return Precision(self.dtype_bits, 0)


def tensors(
    model: nn.Module,
    bits: Iterable[int] = BITS,
    group_sizes: Iterable[int] = GROUP_SIZES,
    *,
    allow_unquantized: bool = False,
) -> list[Tensor]:
    """The quantizable weights of a model with their candidate precisions.

    The model's own ``quant_predicate`` is a floor: what it refuses is left alone, and where it asks
    for certain bits and group size (routers, gates) nothing coarser is a candidate.

    Args:
        model: An mlx-lm model; nothing is evaluated.
        bits: Widths to consider.
        group_sizes: Group sizes to consider.
        allow_unquantized: Whether leaving a weight unquantized is a candidate too.
    """
    predicate: Callable[[str, Any], bool | dict] | None = getattr(model, "quant_predicate", None)
    grid = [Precision(b, g) for b in sorted(set(bits)) for g in sorted(set(group_sizes))]
    result = []
    for path, module in quantizable(model):
        shape, dtype_bits = tuple(module.weight.shape), module.weight.dtype.size * 8
        own = True if predicate is None else predicate(path, module)
        if own is False:
            continue
        options, floor = [p for p in grid if p.fits(shape)], None
        if isinstance(own, dict):
            floor = Precision.of(own)
            options = [
                p for p in options if p.bits >= floor.bits and p.group_size <= floor.group_size
            ] or [p for p in (floor,) if p.fits(shape)]
        if not options:
            continue
        if allow_unquantized:
            options.append(Precision(dtype_bits, 0))
        options.sort(key=lambda p: (p.stored_bits(shape, dtype_bits), -p.bits))
        if floor is not None and not floor.fits(shape):
            floor = options[0]
        result.append(Tensor(path, shape, dtype_bits, tuple(options), floor))
    return result


@dataclass(frozen=True)
class Size:
    """The counts behind the bits per weight that mlx-lm prints.

    Attributes:
        parameters: Number of parameters that mlx-lm divides by, those of leaf modules.
        fixed_bits: Stored bits of everything that is not a candidate.
        files: The weight files that mlx-lm will write.
    """

    parameters: int
    fixed_bits: int
    files: FileSize = NOTHING

    @classmethod
    def of(cls, model: nn.Module, candidates: Iterable[Tensor]) -> "Size":
        """Count a model. Nothing is evaluated."""
        candidates = list(candidates)
        # mlx-lm divides by the parameters of leaf modules only, without those that a block has
        # itself, such as a router's bias.
        own = [leaf.parameters() for _, leaf in leaves(model)]
        parameters = sum(array.size for _, array in _arrays(own))
        # mlx-lm counts the bytes of every array in the module tree, private ones included.
        total = reduce(lambda n, entry: n + entry[1].nbytes * 8, _arrays(model), 0)
        fixed = total - sum(t.size * t.dtype_bits for t in candidates)
        return cls(parameters, fixed, FileSize.of(model, {t.path for t in candidates}))

    def bits_per_weight(self, stored_bits: int) -> float:
        """Bits per weight when the candidates take ``stored_bits``."""
        return (self.fixed_bits + stored_bits) / self.parameters

    def room(self, bits_per_weight: float) -> int:
        """Stored bits left for the candidates under a budget; may be negative."""
        return math.floor(bits_per_weight * self.parameters) - self.fixed_bits

    def file_bytes(self, stored_bits: int) -> int:
        """Bytes of all weight files when the candidates take ``stored_bits``, at most."""
        return self.files.fixed + self.files.headers + math.ceil(stored_bits / 8)

    def limit(self, budget: float | Budget) -> int | None:
        """Bytes that the weight files may take; None if the budget is in bits per weight.

        Raises:
            BudgetError: These are more than the unquantized model takes in 16 bits.
        """
        if not isinstance(budget, Budget) or budget.kind == BPW:
            return None
        original = self.files.original
        limit = math.floor(budget.amount * (1 if budget.kind == SIZE else original))
        if limit > original:
            raise BudgetError(
                f"a budget of {budget} is more than the {size_text(original)} that the weights of "
                "this model take in 16 bits: give a smaller one"
            )
        return limit

    def target(self, budget: float | Budget) -> float:
        """A budget in bits per weight, which may be negative.

        Raises:
            BudgetError: See `limit`.
        """
        limit = self.limit(budget)
        if limit is None:
            return budget.amount if isinstance(budget, Budget) else budget
        room = 8 * (limit - self.files.fixed - self.files.headers)
        # With half a bit more, rounding takes no bit away.
        return (self.fixed_bits + room + 0.5) / self.parameters


def _arrays(tree: Any) -> list[tuple[str, mx.array]]:
    entries = tree_flatten(tree)
    assert isinstance(entries, list)
    return [(path, value) for path, value in entries if isinstance(value, mx.array)]
