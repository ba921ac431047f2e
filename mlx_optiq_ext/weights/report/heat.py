"""The map of bits: which precision each tensor has, by decoder layer and projection."""

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

from ..precision import Precision, Tensor
from . import words
from .charts import tone
from .evidence import Evidence


def bit_map(evidence: Evidence) -> str:
    """The section with a cell for every tensor: layers against projections, then the others."""
    inside = [t for t in evidence.tensors if t.path in evidence.layers]
    outside = [t for t in evidence.tensors if t.path not in evidence.layers]
    counts = Counter(p.bits if p.quantized else 16 for p in evidence.plan.precisions.values())
    legend = "".join(
        f'<li><span class="swatch {tone(bits)}">{bits if bits <= 8 else words.NONE}</span>'
        f"{'bits' if bits <= 8 else 'unquantized'}, {n} tensor{'s' * (n != 1)}</li>"
        for bits, n in sorted(counts.items())
    )
    intro = (
        "<p>Rows are decoder layers, columns their projections. A cell shows bits, group size and, "
        "below, stored bits per weight; point at it for the whole path, the shape and the cost.</p>"
    )
    parts = [intro, f'<ul class="legend">{legend}</ul>']
    if inside:
        parts.append(_heat(evidence, inside))
    if outside:
        parts.append(_outside(evidence, outside))
    return "\n".join(parts)


def _heat(evidence: Evidence, tensors: Sequence[Tensor]) -> str:
    grid: dict[int, dict[str, Tensor]] = {}
    for tensor in tensors:
        layer = evidence.layers[tensor.path]
        name = tensor.path.partition(f".{layer}.")[2] or tensor.path
        grid.setdefault(layer, {})[name] = tensor
    columns = list(dict.fromkeys(name for row in grid.values() for name in row))
    head = "".join(f"<th>{_projection(name)}</th>" for name in columns)
    rows = "".join(
        f"<tr><th>{layer}</th>"
        + "".join(_cell(evidence, row[n]) if n in row else "<td></td>" for n in columns)
        + f'<td class="mean">{_mean(evidence, row.values())}</td></tr>'
        for layer, row in sorted(grid.items())
    )
    foot = "".join(
        f'<td class="mean">{_mean(evidence, [r[n] for r in grid.values() if n in r])}</td>'
        for n in columns
    )
    return (
        f'<div class="scroll"><table class="heat"><thead><tr><th>layer</th>{head}<th>mean</th></tr>'
        f"</thead><tbody>{rows}</tbody><tfoot><tr><th>mean</th>{foot}"
        f'<td class="mean">{_mean(evidence, tensors)}</td></tr></tfoot></table></div>'
    )


def _projection(name: str) -> str:
    module, _, last = name.rpartition(".")
    small = f"<small>{escape(module)}</small>" if module else ""
    return (small + escape(last)).replace("_", "_<wbr>")


def _mean(evidence: Evidence, tensors: Iterable[Tensor]) -> str:
    """Stored bits per weight of a few tensors together."""
    tensors = list(tensors)
    bits = sum(t.stored_bits(evidence.plan.precisions[t.path]) for t in tensors)
    return f"{bits / sum(t.size for t in tensors):.2f}"


def _cell(evidence: Evidence, tensor: Tensor) -> str:
    precision, cost = evidence.plan.precisions[tensor.path], evidence.plan.costs[tensor.path]
    width = tensor.stored_bits(precision) / tensor.size
    title = (
        f"{tensor.path}\n{words.shape(tensor.shape)}\n{words.precision(precision)}: "
        f"{width:.2f} stored bits per weight, {words.size(tensor.stored_bits(precision))}\n"
        f"cost {words.nats(cost)} nats per token"
    )
    return (
        f'<td title="{escape(title)}" data-path="{escape(tensor.path)}" '
        f'data-bits="{precision.bits}" data-group-size="{precision.group_size}" '
        f'data-cost="{cost!r}">'
        f'<span class="cell {tone(precision.bits)}">{short(precision)}<small>{width:.2f}</small>'
        "</span></td>"
    )


def short(precision: Precision) -> str:
    """Bits and group size, as in a cell."""
    return f"<b>{precision.bits}</b>" + (f" g{precision.group_size}" if precision.quantized else "")


def _outside(evidence: Evidence, tensors: Iterable[Tensor]) -> str:
    rows = "".join(
        f"<tr><th>{breakable(t)}</th>{_cell(evidence, t)}"
        f'<td class="num">{words.shape(t.shape)}</td>'
        f'<td class="num">{words.nats(evidence.plan.costs[t.path])}</td></tr>'
        for t in tensors
    )
    head = '<th></th><th></th><th class="num">shape</th><th class="num">cost</th>'
    return (
        '<div class="scroll"><table class="data plain outside"><caption>Outside of the decoder '
        f"layers</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def breakable(tensor: Tensor) -> str:
    """A path that may break behind its dots."""
    return f'<span class="path">{escape(tensor.path).replace(".", ".<wbr>")}</span>'
