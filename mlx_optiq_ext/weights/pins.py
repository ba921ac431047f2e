"""Pins: precisions that the user gives some tensors, beside which the rest is planned."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from ..errors import InputError
from .candidates import Tensor
from .precision import BITS, GROUP_SIZES, Precision

#: Bits of a pin that leaves tensors alone.
ALONE = 16


@dataclass(frozen=True)
class Pin:
    """A precision for the tensors whose paths match a pattern.

    Attributes:
        pattern: A glob on module paths, as ``fnmatch`` has them; ``*`` matches dots too.
        bits: Bits of a weight, or `ALONE`.
        group_size: None leaves the choice of the group size to the plan.
    """

    pattern: str
    bits: int
    group_size: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Pin":
        """Read ``PATTERN=BITS``, ``PATTERN=BITSgGROUP`` or ``PATTERN=16``.

        Raises:
            InputError: It is none of these, or MLX lacks the bits or the group size.
        """
        found = re.fullmatch(r"\s*(\S{1,500}?)\s*=\s*(\d{1,3})(?:g(\d{1,4}))?\s*", text)
        if found is None:
            raise InputError(
                f"{text!r} is not PATTERN=BITS or PATTERN=BITSgGROUP, such as '*.v_proj=8g64'"
            )
        bits, group_size = int(found[2]), None if found[3] is None else int(found[3])
        if bits == ALONE and group_size is not None:
            raise InputError(f"{text!r} has groups for what stays in 16 bits: give {ALONE} alone")
        if bits not in (*BITS, ALONE) or group_size not in (*GROUP_SIZES, None):
            raise InputError(
                f"{text!r} is no precision of MLX: give {', '.join(map(str, BITS))} bits, in "
                f"groups of {', '.join(map(str, GROUP_SIZES))}, or {ALONE} to leave tensors alone"
            )
        return cls(found[1], bits, group_size)

    def matches(self, path: str) -> bool:
        """Whether the pattern matches a module path."""
        return fnmatchcase(path, self.pattern)

    def __str__(self) -> str:
        group = "" if self.group_size is None else f"g{self.group_size}"
        return f"{self.pattern}={self.bits}{group}"


def pinned(
    tensors: Sequence[Tensor], paths: Iterable[str], pins: Sequence[Pin], groups: Sequence[int]
) -> tuple[list[Tensor], dict[str, Precision]]:
    """The tensors to plan under some pins, and those that are left alone.

    Where several pins match a tensor, the last one counts. A pin may ask for fewer bits than the
    model's own ``quant_predicate``.

    Args:
        tensors: The model's candidates.
        paths: Paths of all modules that could be quantized.
        pins: What the user asks for.
        groups: Group sizes that a pin without one leaves to the plan, if they fit.

    Returns:
        The candidates, those of pins with the pinned precisions only; and the path of each tensor
        that is left alone with its unquantized precision. These are no candidates.

    Raises:
        InputError: A pin matches nothing that is planned, or its groups do not divide the inputs
            of a tensor.
    """
    paths, known = list(paths), {t.path for t in tensors}
    for pin in pins:
        _check(pin, paths, known)
    planned, alone = [], {}
    for tensor in tensors:
        pin = next((each for each in reversed(pins) if each.matches(tensor.path)), None)
        if pin is None:
            planned.append(tensor)
        elif pin.bits == ALONE:
            alone[tensor.path] = tensor.unquantized
        else:
            planned.append(replace(tensor, precisions=_choices(tensor, pin, groups), pinned=True))
    return planned, alone


def _check(pin: Pin, paths: Sequence[str], known: Iterable[str]) -> None:
    """Refuse a pin without any tensor."""
    named = [path for path in paths if pin.matches(path)]
    if not named:
        raise InputError(
            f"the pin {pin} matches no tensor of this model: their paths are like {paths[0]}"
            if paths
            else f"the pin {pin} matches nothing: this model has no tensor to quantize"
        )
    if pin.bits != ALONE and not set(named) & set(known):
        raise InputError(
            f"the pin {pin} matches only what cannot be quantized, such as {named[0]}: the model's "
            "own code leaves it alone, or no group size divides its inputs"
        )


def _choices(tensor: Tensor, pin: Pin, groups: Sequence[int]) -> tuple[Precision, ...]:
    """The precisions that a pin leaves a tensor, by rising stored bits."""
    wanted = groups if pin.group_size is None else (pin.group_size,)
    found = [Precision(pin.bits, g) for g in wanted]
    fitting = [p for p in found if p.fits(tensor.shape)]
    if not fitting and pin.group_size is None:
        fitting = [p for g in GROUP_SIZES if (p := Precision(pin.bits, g)).fits(tensor.shape)]
    if not fitting:
        raise InputError(
            f"the pin {pin} matches {tensor.path} with {tensor.shape[-1]} inputs, which groups of "
            f"{wanted[0]} do not divide: give a smaller group size"
        )
    return tuple(sorted(fitting, key=tensor.stored_bits))
