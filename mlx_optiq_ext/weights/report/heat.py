"""The map of bits: the precision of each tensor, by decoder layer and projection."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..candidates import Tensor
from ..precision import Precision
from . import words
from .evidence import Evidence


@dataclass(frozen=True)
class Cell:
    """A tensor on the map.

    Attributes:
        tensor: The tensor.
        precision: What the plan gives it.
        width: Its stored bits per weight.
        sensitivity: Its expected KL as planned, in nats per token.
        title: Tooltip.
    """

    tensor: Tensor
    precision: Precision
    width: float
    sensitivity: float
    title: str


@dataclass(frozen=True)
class Heat:
    """Decoder layers against their projections, and stored bits per weight along both.

    Attributes:
        columns: Module and name of each projection, such as ``("self_attn", "q_proj")``.
        rows: Index of a layer, its cells (None where it lacks the projection), and its mean.
        means: The mean of each column.
        mean: The mean of all.
    """

    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[int, tuple[Cell | None, ...], float], ...]
    means: tuple[float, ...]
    mean: float


def legend(evidence: Evidence) -> list[tuple[int, int]]:
    """Bits and how many tensors have them; 16 stands for unquantized."""
    precisions = evidence.plan.precisions.values()
    return sorted(Counter(p.bits if p.quantized else 16 for p in precisions).items())


def heat(evidence: Evidence) -> Heat | None:
    """The map of the decoder layers; None if no tensor is in one."""
    tensors = [t for t in evidence.tensors if t.path in evidence.layers]
    if not tensors:
        return None
    grid: dict[int, dict[str, Tensor]] = {}
    for tensor in tensors:
        layer = evidence.layers[tensor.path]
        name = tensor.path.partition(f".{layer}.")[2] or tensor.path
        grid.setdefault(layer, {})[name] = tensor
    names = list(dict.fromkeys(name for row in grid.values() for name in row))
    return Heat(
        columns=tuple((name.rpartition(".")[0], name.rpartition(".")[2]) for name in names),
        rows=tuple(
            (
                layer,
                tuple(cell(evidence, row[name]) if name in row else None for name in names),
                _mean(evidence, row.values()),
            )
            for layer, row in sorted(grid.items())
        ),
        means=tuple(
            _mean(evidence, [row[name] for row in grid.values() if name in row]) for name in names
        ),
        mean=_mean(evidence, tensors),
    )


def outside(evidence: Evidence) -> Sequence[Cell]:
    """The tensors outside of the decoder layers."""
    return [cell(evidence, t) for t in evidence.tensors if t.path not in evidence.layers]


def cell(evidence: Evidence, tensor: Tensor) -> Cell:
    """A tensor on the map."""
    precision, sensitivity = (
        evidence.plan.precisions[tensor.path],
        evidence.plan.sensitivities[tensor.path],
    )
    width = tensor.stored_bits(precision) / tensor.size
    title = (
        f"{tensor.path}\n{words.shape(tensor.shape)}\n{words.precision(precision)}: "
        f"{width:.2f} stored bits per weight, {words.size(tensor.stored_bits(precision))}\n"
        f"sensitivity {words.nats(sensitivity)} nats per token"
    )
    return Cell(tensor, precision, width, sensitivity, title)


def _mean(evidence: Evidence, tensors: Iterable[Tensor]) -> float:
    """Stored bits per weight of a few tensors together."""
    tensors = list(tensors)
    bits = sum(t.stored_bits(evidence.plan.precisions[t.path]) for t in tensors)
    return bits / sum(t.size for t in tensors)
