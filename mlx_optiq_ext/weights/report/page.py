"""The report of a plan: one self-contained page that shows where the bits went, and why."""

import functools
import os
from pathlib import Path
from typing import Any

from ... import files
from ..._version import __version__
from ...errors import InputError
from ...planning.calibration import on
from . import words
from .charts import kl_chart, sensitivity_chart, tone
from .evidence import Evidence, Gain
from .heat import heat, legend, outside

#: Rows of the last table that are shown at once; the others are folded up.
SHOWN = 20
#: Its columns behind the sensitivity at the common precision.
LABELS = ("as planned", "share of the sum", "bits extra")


def check_target(path: Path, *, drawing: bool = False) -> None:
    """Make sure that a report can be written to a path.

    Args:
        path: The file.
        drawing: Whether it is the drawing of a forecast, not the page of a plan.

    Raises:
        InputError: It does not end in .html, or .svg for a drawing, is a folder, or its folder is
            missing or read-only.
    """
    option = f"--optiq-report {path}"
    if drawing and path.suffix.lower() != ".svg":
        raise InputError(
            f"{option}: of budgets that are only compared there is a drawing, name a file that "
            "ends in .svg"
        )
    if not drawing and path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{option}: the report is a web page, name a file that ends in .html")
    if path.is_dir():
        inside = path / ("curve.svg" if drawing else "plan.html")
        raise InputError(f"{option} is a folder: name a file in it, such as {inside}")
    if not path.parent.is_dir():
        raise InputError(f"{option}: the folder {path.parent} does not exist, create it first")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{option}: the folder {path.parent} cannot be written to, name another")


def write(path: Path, evidence: Evidence) -> None:
    """Write the page, completely or not at all.

    Raises:
        InputError: The file cannot be written.
    """
    write_document(path, report(evidence), "report")


def write_document(path: Path, text: str, what: str) -> None:
    """Write a document, completely or not at all; ``what`` names it in the message.

    Raises:
        InputError: The file cannot be written.
    """
    try:
        files.write_text(path, text)
    except OSError as error:
        raise InputError(f"cannot write the {what} {path}: {error.strerror or error}") from error


def report(evidence: Evidence) -> str:
    """The page as HTML: no script, nothing loaded from elsewhere, every name escaped."""
    from markupsafe import Markup

    page = _environment().get_template("page.html")
    return page.render(
        evidence=evidence,
        title=f"{evidence.name} at {evidence.plan.achieved_bpw:.3f} bits per weight",
        generator=f"mlx-optiq-ext {__version__}",
        tiles=_tiles(evidence),
        facts=_facts(evidence),
        kl_chart=Markup(kl_chart(evidence)),
        compared=_compared(evidence),
        legend=legend(evidence),
        heat=heat(evidence),
        outside=outside(evidence),
        sensitivity_chart=Markup(sensitivity_chart(evidence)),
        labels=(f"sensitivity at {words.kind(evidence.common)}", *LABELS),
        shown=SHOWN,
    )


@functools.cache
def _environment() -> Any:
    """Jinja2 with the templates beside this file; whatever they print is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.globals.update(words=words, tone=tone, values=_values)
    return environment


def _tiles(evidence: Evidence) -> list[tuple[str, str]]:
    """Values and captions of the figures at the top of the page."""
    plan, total = evidence.plan, evidence.model_bits(evidence.stored_bits)
    original = evidence.model_bits(evidence.unquantized_bits)
    source = plan.calibration.get("source")
    text = f" on text {on(source)}" if source else ""
    tiles = [
        (f"{plan.achieved_bpw:.3f}", f"bits per weight (budget: {plan.aim})"),
        (words.size(total), f"of {words.size(original)} unquantized"),
        (words.nats(evidence.kl), f"KL to the unquantized model{text}, nats per token"),
    ]
    for side, uniform in evidence.nearest.items():
        if uniform.kl > 0:
            bpw = evidence.size.bits_per_weight(uniform.stored_bits)
            tiles.append(
                (
                    words.ratio(evidence.kl, uniform.kl),
                    f"the KL of uniform {words.kind(uniform.precision)} at {bpw:.3f} bits per "
                    f"weight, the nearest {side} the budget",
                )
            )
    return tiles


def _facts(evidence: Evidence) -> list[tuple[str, str]]:
    """Names and texts of the facts about the plan."""
    plan, data = evidence.plan, evidence.plan.calibration
    count = data.get("sequences", data.get("windows"))  # the key of older plans
    sequences = [] if count is None else [f"{count} sequences"]
    sequences += [f"of {data['length']} tokens"] if "length" in data else []
    kept = "held out of the measurement" if evidence.held_out else "too few to hold any out"
    refined = ", refined: its KL is that of the refined weights" * evidence.refined
    facts = [
        ("Method", f"{plan.method} (plan: {plan.variant}){refined}"),
        ("Calibration", ", ".join(filter(None, [data.get("source"), " ".join(sequences)]))),
        ("Judged on", f"{evidence.judged_on:,} tokens, {kept}"),
        ("Versions", ", ".join(f"{name} {v}" for name, v in plan.versions.items())),
        ("Parameters", words.count(evidence.size.parameters)),
    ]
    return [(name, text) for name, text in facts if text]


def _compared(evidence: Evidence) -> list[tuple[str, str, int, float]]:
    """Name, kind, stored bits and KL of the plan and of its references, by rising bits."""
    rows = [("This plan", "this", evidence.stored_bits, evidence.kl)]
    rows += [
        (f"Uniform {words.kind(j.precision)}", "", j.stored_bits, j.kl) for j in evidence.references
    ]
    rows += [("Unquantized", "", evidence.unquantized_bits, 0.0)]
    return sorted(rows, key=lambda row: row[2])


def _values(gain: Gain) -> tuple[str, str, str, str]:
    """Cells of a row of the last table, under ``labels``."""
    return (
        words.NONE if gain.sensitivity is None else words.nats(gain.sensitivity),
        words.nats(gain.planned),
        words.NONE if gain.share is None else words.percent(gain.share),
        f"{gain.extra_bits:+,}",
    )
