"""The formats that a plan can name."""

from collections.abc import Mapping
from typing import Any, TypeVar

from ...errors import InputError
from ...files import shown
from .format import Format

#: ``"method"`` of an entry without one: the published form of kv_config.json has only this.
DEFAULT = "affine"
#: Letters that have a meaning in a spec such as ``k8v4g32``.
RESERVED = "gkv"

_formats: dict[str, type[Format]] = {}

Kind = TypeVar("Kind", bound=type[Format])


def register(format: Kind) -> Kind:
    """Let plans and specs name a format; usable as a class decorator.

    Args:
        format: A subclass of `Format`. To register it again changes nothing.

    Raises:
        InputError: Another format has its name or one of its letters, or a letter is none.
    """
    for other in _formats.values():
        if other is format:
            return format
        if other.name == format.name:
            raise InputError(f"a KV format {format.name!r} is registered already: choose a name")
        if taken := other.letters.keys() & format.letters.keys():
            raise InputError(
                f"KV format {format.name!r}: the letter {min(taken)!r} belongs to {other.name!r}: "
                "choose another"
            )
    for letter in format.letters:
        if letter and not (len(letter) == 1 and "a" <= letter <= "z" and letter not in RESERVED):
            raise InputError(
                f"KV format {format.name!r}: {letter!r} is not one letter from a to z other than "
                f"{', '.join(RESERVED)}"
            )
    _formats[format.name] = format
    return format


def unregister(format: type[Format]) -> None:
    """Undo `register`."""
    if _formats.get(format.name) is format:
        del _formats[format.name]


def registered() -> tuple[type[Format], ...]:
    """All formats, in the order in which they were registered."""
    return tuple(_formats.values())


def letters() -> str:
    """Every letter that may stand behind a width."""
    return "".join(letter for format in _formats.values() for letter in format.letters)


def fields() -> set[str]:
    """Every field that may tell keys from values in an entry of kv_config.json."""
    return {"method", *(name for format in _formats.values() for name in format.fields)}


def from_spec(bits: int, letter: str, group_size: int | None, where: str) -> Format:
    """The format of a width, a letter of `letters` (or none) and a group size in a spec.

    Raises:
        InputError: The format does not know these bits or this group size.
    """
    format = next(f for f in _formats.values() if letter in f.letters)
    given = {"bits": bits, "group_size": group_size, **format.letters[letter]}
    return format.from_json(given, where)


def from_json(given: Mapping[str, Any], where: str) -> Format:
    """The format of the fields of one side; see `Format.from_json`.

    Raises:
        InputError: The method is not known, or the format refuses a field.
    """
    method = given.get("method", DEFAULT)
    if not isinstance(method, str) or method not in _formats:
        names = " or ".join(f'"{name}"' for name in _formats)
        raise InputError(f"{where}: method {shown(method)} is not known: use {names}")
    return _formats[method].from_json(given, where)


def to_json(format: Format) -> dict[str, Any]:
    """The fields that `from_json` reads a format from, its method among them."""
    fields = format.to_json()
    return fields if format.name == DEFAULT else {**fields, "method": format.name}
