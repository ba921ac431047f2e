"""The report of a plan: one self-contained page that shows where the bits went, and why."""

import os
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template

from ... import files
from ..._version import __version__
from ...errors import InputError
from . import words
from .charts import kl_chart, sensitivity_chart, tone
from .evidence import Evidence, Gain
from .heat import bit_map, breakable, short

#: Rows of the last table that are shown at once; the others are folded up.
SHOWN = 20


def check_target(path: Path) -> None:
    """Make sure that a report can be written to a path.

    Raises:
        InputError: It does not end in .html, is a folder, or its folder is missing or read-only.
    """
    option = f"--optiq-report {path}"
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{option}: the report is a web page, name a file that ends in .html")
    if path.is_dir():
        raise InputError(f"{option} is a folder: name a file in it, such as {path / 'plan.html'}")
    if not path.parent.is_dir():
        raise InputError(f"{option}: the folder {path.parent} does not exist, create it first")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{option}: the folder {path.parent} cannot be written to, name another")


def write(path: Path, evidence: Evidence) -> None:
    """Write the page, whole or not at all.

    Raises:
        InputError: The file cannot be written.
    """
    try:
        files.write_text(path, report(evidence))
    except OSError as error:
        raise InputError(f"cannot write the report {path}: {error.strerror or error}") from error


def report(evidence: Evidence) -> str:
    """The page as HTML: no script, nothing loaded from elsewhere, every name escaped."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=escape(f"{evidence.name} at {evidence.plan.achieved_bpw:.3f} bits per weight"),
        generator=escape(f"mlx-optiq-ext {__version__}"),
        name=escape(evidence.name),
        tiles=_tiles(evidence),
        facts=_facts(evidence),
        uniform=_uniform(evidence),
        bits=bit_map(evidence),
        sensitivity=_sensitivity(evidence),
        gains=_gains(evidence),
    )


def _tiles(evidence: Evidence) -> str:
    plan, total = evidence.plan, evidence.model_bits(evidence.stored_bits)
    original = evidence.model_bits(evidence.unquantized_bits)
    tiles = [
        (f"{plan.achieved_bpw:.3f}", f"bits per weight (budget: {plan.target_bpw:g})"),
        (words.size(total), f"of {words.size(original)} unquantized"),
        (words.nats(evidence.kl), "KL to the unquantized model, nats per token"),
    ]
    if (uniform := evidence.same_bytes) is not None and uniform.kl > 0:
        ratio = words.ratio(evidence.kl, uniform.kl)
        tiles.append(
            (
                ratio,
                f"the KL of uniform {words.kind(uniform.precision)}, the best within the budget",
            )
        )
    return "\n".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>'
        for value, what in tiles
    )


def _facts(evidence: Evidence) -> str:
    plan, data = evidence.plan, evidence.plan.calibration
    windows = [f"{data[k]} {word}" for k, word in (("windows", "windows"),) if k in data]
    windows += [f"of {data['length']} tokens"] if "length" in data else []
    kept = "held out of the measurement" if evidence.held_out else "too few to hold any out"
    refined = ", refined: its KL is that of the refined weights" * evidence.refined
    facts = [
        ("Method", f"{plan.method} (plan: {plan.variant}){refined}"),
        ("Calibration", ", ".join(filter(None, [data.get("source"), " ".join(windows)]))),
        ("Judged on", f"{evidence.judged_on:,} tokens, {kept}"),
        ("Versions", ", ".join(f"{name} {v}" for name, v in plan.versions.items())),
        ("Parameters", words.count(evidence.size.parameters)),
    ]
    return "\n".join(f"<dt>{n}</dt><dd>{escape(str(v))}</dd>" for n, v in facts if v)


def _uniform(evidence: Evidence) -> str:
    plan, bpw = evidence.plan, evidence.size.bits_per_weight
    mine = (evidence.stored_bits, evidence.kl)
    rows = [("This plan", "this", *mine)]
    rows += [
        (f"Uniform {words.kind(j.precision)}", "", j.stored_bits, j.kl) for j in evidence.references
    ]
    rows += [("Unquantized", "", evidence.unquantized_bits, 0.0)]
    body = "".join(
        f'<tr class="{kind}" data-bpw="{bpw(bits)!r}" data-kl="{kl!r}"><th>{name}</th>'
        f'<td class="num">{bpw(bits):.3f}</td>'
        f'<td class="num">{words.exact(evidence.model_bits(bits))}</td>'
        f'<td class="num">{words.nats(kl)}</td>'
        f'<td class="num">{words.ratio(kl, evidence.kl)}</td></tr>'
        for name, kind, bits, kl in sorted(rows, key=lambda row: row[2])
    )
    head = "<th></th>" + "".join(
        f'<th class="num">{name}</th>' for name in ("bits / weight", "bytes", "KL", "to the plan")
    )
    table = (
        f'<div class="scroll"><table class="data plain compare"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
    chart = kl_chart(evidence) or '<p class="note">No KL is above zero: there is no chart.</p>'
    if evidence.equal_bpw is not None:
        saved = 1 - plan.achieved_bpw / evidence.equal_bpw
        word = "fewer" if saved >= 0 else "more"
        table += (
            f'<p class="note">Between these points, uniform packings would reach the plan\'s KL at '
            f"about {evidence.equal_bpw:.2f} bits per weight (interpolated on a log scale): the "
            f"plan takes {words.percent(abs(saved))} {word} bytes for the same KL.</p>"
        )
    return f'<div class="pair"><figure>{chart}</figure><div>{table}</div></div>'


def _sensitivity(evidence: Evidence) -> str:
    chart = sensitivity_chart(evidence)
    if not chart:
        return '<p class="note">No cost is above zero: there is no chart.</p>'
    curve, plan = evidence.curve, evidence.plan
    top = curve[: max(1, len(curve) // 10)]
    share = sum(cost for _, cost in top) / evidence.total_cost
    few = "The costliest tensor carries" if len(top) == 1 else f"The costliest {len(top)} carry"
    names = ", ".join(f"{breakable(t)} ({words.nats(c)})" for t, c in curve[:3])
    left = len(evidence.tensors) - len(curve)
    absent = f" {left} that cannot be packed so are not drawn." if left else ""
    told = (
        f"<p>The line is each tensor's cost at {words.kind(evidence.common)}, the packing next to "
        f"the plan's average of {evidence.average:.2f} bits per weight. A dot is its cost as "
        "planned, coloured by bits as above; on the axis it has none, such as unquantized. "
        f"Point at one for its name.{absent}</p>"
        f"<p>{few} {words.percent(share)} of the cost of all {len(curve)}. On top: {names}.</p>"
        f"<p>As planned, all costs add up to {words.nats(sum(plan.costs.values()))} nats per "
        f"token; measured end to end the plan has {words.nats(evidence.kl)}.</p>"
    )
    return f'<div class="pair"><figure>{chart}</figure><div>{told}</div></div>'


def _gains(evidence: Evidence) -> str:
    gains = evidence.gains
    if not gains:
        return "<p>None: every tensor takes the average bits per weight.</p>"
    shares = [g.share for g in gains if g.share is not None]
    common = words.kind(evidence.common)
    part = f" At {common} they would carry {words.percent(sum(shares))} of the cost."
    weights = words.percent(sum(g.weight_share for g in gains))
    intro = (
        f"<p>{len(gains)} of {len(evidence.tensors)} tensors, with {weights} of the weights, take "
        f"more than the average of {evidence.average:.2f} stored bits per weight; the others make "
        f"room for them.{part if shares else ''} Bits extra are those above {common}.</p>"
    )
    shown, folded = gains[:SHOWN], gains[SHOWN:]
    rest = f"<details><summary>{len(folded)} more</summary>{_rows(evidence, folded)}</details>"
    return intro + _rows(evidence, shown) + (rest if folded else "")


def _rows(evidence: Evidence, gains: Iterable[Gain]) -> str:
    at = f"cost at {words.kind(evidence.common)}"
    names = ("", "bits", at, "cost now", "share of cost", "bits extra")
    head = "".join(f'<th class="{"num" * (i > 1)}">{n}</th>' for i, n in enumerate(names))
    body = "".join(
        f'<tr data-path="{escape(g.tensor.path)}"><th>{breakable(g.tensor)}</th>'
        f'<td><span class="cell {tone(g.precision.bits)}">{short(g.precision)}</span></td>'
        + "".join(
            f'<td class="num" data-label="{label}">{value}</td>'
            for label, value in zip(names[2:], _values(g), strict=True)
        )
        + f'<td class="reason">{escape(words.reason(g, evidence))}</td></tr>'
        for g in gains
    )
    return (
        '<div class="scroll"><table class="data why"><thead><tr>'
        f"{head}<th>why</th></tr></thead><tbody>{body}</tbody></table></div>"
    )


def _values(gain: Gain) -> tuple[str, str, str, str]:
    return (
        words.NONE if gain.cost is None else words.nats(gain.cost),
        words.nats(gain.cost_now),
        words.NONE if gain.share is None else words.percent(gain.share),
        f"{gain.extra_bits:+,}",
    )
