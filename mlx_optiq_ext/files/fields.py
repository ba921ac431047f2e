"""Typed fields of a JSON object, each refused in one sentence."""

import math
import reprlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError

#: The largest integer that other programs can be expected to hold.
LARGEST = 2**63 - 1

#: Default of a required field.
REQUIRED: Any = object()

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = 60
_shortened.maxlevel = 2


def shown(value: Any) -> str:
    """A value from a file for a message: its repr, shortened."""
    text = _shortened.repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."


@dataclass(frozen=True)
class Fields:
    """A JSON object and its place in a file.

    Each method returns a field of one type, or its default if the field is absent. A required field
    has no default.

    Attributes:
        entry: The object.
        where: The file, and the place in it, for messages.
    """

    entry: Mapping[str, Any]
    where: str

    @classmethod
    def of(cls, value: Any, where: str) -> "Fields":
        """Take a value as an object.

        Raises:
            InputError: The value is not a JSON object.
        """
        if not isinstance(value, Mapping):
            raise InputError(f"{where} is {shown(value)}: give a JSON object")
        return cls(value, where)

    def integer(self, name: str, low: int = 0, high: int = LARGEST, default: Any = REQUIRED) -> int:
        """A whole number from ``low`` to ``high``; 8.0 and true are refused."""
        value = self._value(name, default)
        if value is default:
            return value
        if type(value) is not int or not low <= value <= high:
            raise self.refusal(name, f"a whole number {_range(low, high)}")
        return value

    def number(
        self,
        name: str,
        low: float = -math.inf,
        high: float = math.inf,
        default: Any = REQUIRED,
    ) -> float:
        """A finite number from ``low`` to ``high``."""
        value = self._value(name, default)
        if value is default:
            return value
        finite = type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max
        if not finite or not low <= value <= high:
            raise self.refusal(name, f"a finite number {_range(low, high)}".rstrip())
        return float(value)

    def text(self, name: str, default: Any = REQUIRED) -> str:
        """A string."""
        return self._of_type(name, str, "a string", default)

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        """True or false."""
        return self._of_type(name, bool, "true or false", default)

    def items(self, name: str, default: Any = REQUIRED) -> list[Any]:
        """A list."""
        return self._of_type(name, list, "a list", default)

    def table(self, name: str, default: Any = REQUIRED) -> "Fields":
        """An object within this one."""
        found = self._of_type(name, dict, "an object", default)
        return found if found is default else Fields(found, f"{self.where}: {name}")

    def choice(self, name: str, choices: Sequence[Any], default: Any = REQUIRED) -> Any:
        """One of some values; 8.0 is not 8, and true is not 1."""
        value = self._value(name, default)
        if value is default or any(type(value) is type(c) and value == c for c in choices):
            return value
        raise self.refusal(name, f"one of {', '.join(map(str, choices))}")

    def refusal(self, name: str, wanted: str) -> InputError:
        """The error for a field with an unusable value."""
        if name not in self.entry:
            return InputError(f"{self.where} has no {name}: give {wanted}")
        return InputError(f"{self.where}: {name} is {shown(self.entry[name])}: give {wanted}")

    def _value(self, name: str, default: Any) -> Any:
        return self.entry.get(name, None if default is REQUIRED else default)

    def _of_type(self, name: str, kind: type, wanted: str, default: Any) -> Any:
        value = self._value(name, default)
        if value is default or type(value) is kind:
            return value
        raise self.refusal(name, wanted)


def _range(low: float, high: float) -> str:
    if high in (LARGEST, math.inf):
        return "" if low == -math.inf else f"from {low} on"
    return f"from {low} to {high}"
