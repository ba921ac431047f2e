"""The report of a plan: one self-contained page that shows where the bits went, and why."""

from .evidence import Evidence, Judged, gather, uniforms
from .page import check_target, report, write

__all__ = ["Evidence", "Judged", "check_target", "gather", "report", "uniforms", "write"]
