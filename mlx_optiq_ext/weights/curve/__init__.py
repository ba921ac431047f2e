"""What conversions would come to, for one budget or several, without writing a model."""

from .chart import drawn, write
from .comparison import Comparison, compare
from .expense import Expense
from .points import Curve, Point, forecast
from .words import summary

__all__ = [
    "Comparison",
    "Curve",
    "Expense",
    "Point",
    "compare",
    "drawn",
    "forecast",
    "summary",
    "write",
]
