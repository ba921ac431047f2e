"""Parsed options as frozen dataclasses, one for each command."""

from collections.abc import Iterable
from dataclasses import MISSING, fields
from types import SimpleNamespace
from typing import Any, TypeVar

Options = TypeVar("Options")


def read(kind: type[Options], parsed: SimpleNamespace) -> Options:
    """Make a command's options from argparse's values.

    Args:
        kind: A dataclass whose fields are named like the options, without ``--optiq-``, and have
            defaults.
        parsed: Argparse's values; an option that was not given is None or absent.
    """
    values = {each.name: getattr(parsed, each.name, None) for each in fields(kind)}  # pyright: ignore[reportArgumentType]
    return kind(**{name: value for name, value in values.items() if value is not None})


def given(options: Any) -> list[str]:
    """Names of the options that differ from their defaults, in their order."""
    return [
        each.name
        for each in fields(options)
        if each.default is MISSING or getattr(options, each.name) != each.default
    ]


def spelled(names: Iterable[str]) -> str:
    """Options as the user writes them, joined by commas."""
    return ", ".join(f"--optiq-{name.replace('_', '-')}" for name in names)
