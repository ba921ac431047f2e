"""Formats the numbers of a report."""

import math

from ..precision import Precision
from .evidence import Evidence, Gain

#: Shown in place of a missing number.
NONE = "\N{EN DASH}"
SPACE = "\N{NO-BREAK SPACE}"
TIMES = "\N{MULTIPLICATION SIGN}"

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power(exponent: int) -> str:
    """A power of ten, such as 10⁻³."""
    return f"10{str(exponent).translate(_RAISED)}"


def nats(value: float) -> str:
    """A divergence in nats, to three digits."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if 1e-3 <= abs(value) < 100:
        return f"{value:#.3g}"
    if 100 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    digits, _, exponent = f"{value:.2e}".partition("e")
    return f"{digits}{TIMES}{power(int(exponent))}"


def count(value: float) -> str:
    """A number of things, such as 1.6 million."""
    for unit, name in ((1e9, " billion"), (1e6, " million")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:,.0f}"


def size(bits: float) -> str:
    """Stored bits as bytes in decimal units, as disks and hubs count them."""
    value = abs(bits) / 8
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.{2 if value < 100 * unit else 1}f}{SPACE}{name}"
    return f"{value:,.0f} B"


def exact(bits: int) -> str:
    """Stored bits as whole bytes."""
    return f"{(bits + 7) // 8:,}"


def percent(share: float) -> str:
    """A share, to one digit below 10 %."""
    if 0 < share < 0.001:
        return f"<{SPACE}0.1{SPACE}%"
    return f"{100 * share:.{1 if share < 0.0995 else 0}f}{SPACE}%"


def times(ratio: float) -> str:
    """A factor, to two digits, or whole from 10 on."""
    return f"{ratio:,.0f}" if ratio >= 9.95 else f"{ratio:.1f}"


def shape(value: tuple[int, ...]) -> str:
    """A tensor's shape."""
    return f" {TIMES} ".join(map(str, value))


def kind(value: Precision | None) -> str:
    """A precision's name, kept on one line."""
    return str(value).replace("-", "\N{NON-BREAKING HYPHEN}").replace(" ", SPACE)


def precision(value: Precision) -> str:
    """A precision in full."""
    return str(value) if value.quantized else f"unquantized, {value.bits}-bit"


def ratio(value: float, reference: float) -> str:
    """A divergence as a multiple of another one."""
    if value <= 0 or reference <= 0:
        return NONE
    factor = value / reference
    digits = f"{factor:,.0f}" if factor >= 100 else f"{factor:#.3g}" if factor >= 1 else ""
    return f"{digits or format(factor, '.2g')}{SPACE}{TIMES}"


def reason(gain: Gain, evidence: Evidence) -> str:
    """Why a tensor takes more bits than the average, in a sentence or two."""
    return f"{_why(gain, evidence)} {_what_for(gain)}".strip()


def _why(gain: Gain, evidence: Evidence) -> str:
    tensor, name = gain.tensor, kind(evidence.common)
    if tensor.pinned:
        return "Pinned by the user."
    if tensor.own is not None and (gain.share is None or gain.precision == tensor.own):
        return f"The model's own code asks for at least {kind(tensor.own)} here."
    if gain.share is None or gain.sensitivity is None:
        return f"It cannot be quantized at {name}."
    if gain.sensitivity <= 0:
        return f"At {name} its sensitivity is too small to be measured."
    weight = gain.share / gain.weight_share
    part, of_weights = percent(gain.share), percent(gain.weight_share)
    shares = f"{part} of all sensitivity with {of_weights} of the weights"
    if weight >= 1.05:
        return f"Carries {shares}: {times(weight)}{SPACE}{TIMES} its share."
    if weight > 0.95:
        return f"Carries {shares}, as its size suggests."
    if evidence.plan.variant == "protected" and _at_an_end(gain, evidence):
        return f"Carries only {shares}, but this plan protects both ends of the model."
    return f"Carries {shares}, less than its size suggests, but more bits pay off here too."


def _at_an_end(gain: Gain, evidence: Evidence) -> bool:
    last = max(evidence.layers.values(), default=0)
    return evidence.layers.get(gain.tensor.path) in (None, 0, last)


def _what_for(gain: Gain) -> str:
    if gain.sensitivity is None or gain.sensitivity <= 0 or gain.extra_bits <= 0:
        return ""
    extra = f"{size(gain.extra_bits)} more"
    if gain.planned <= 0:
        return f"{extra} leave it unquantized, without any loss."
    if gain.planned < gain.sensitivity:
        return f"{extra} lower its expected KL {times(gain.sensitivity / gain.planned)}-fold."
    return f"{extra} do not lower its expected KL."
