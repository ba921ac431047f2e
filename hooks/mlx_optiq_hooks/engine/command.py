"""What we add to a stock command, and the groups in which its help shows our options."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any, TypeAlias

PREFIX = "optiq_"
#: Title of the options that a command puts into no group.
OTHER = "other"

#: What runs in place of a stock command.
Run: TypeAlias = Callable[[], None]


def _nothing(*arguments: Any) -> None:
    """Default of `Command`: adds no options and checks nothing."""


@dataclass(frozen=True)
class Command:
    """Our additions to one stock command.

    Attributes:
        add_arguments: Adds our options to an argparse group.
        check: Called with ``(command, options, args)``, like the hook ``optiq_check_options``.
        replaced: Destination of a required stock option -> the option of ours that replaces it.
        interrupted: Gives the text that follows "interrupted" after Ctrl-C; None leaves Ctrl-C to
            stock.
        environment: Destination of an option of ours that may be given many times -> environment
            variable that gives it where the command line does not.
        groups: Title of a group in the help -> destinations of its options, without ``optiq_``.
    """

    add_arguments: Callable[[Any], None] = _nothing
    check: Callable[[str, SimpleNamespace, argparse.Namespace], Run | None] = _nothing
    replaced: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    interrupted: Callable[[], str] | None = str
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    groups: Mapping[str, Sequence[str]] = field(default_factory=lambda: MappingProxyType({}))


def grouped(
    actions: Iterable[argparse.Action], groups: Mapping[str, Sequence[str]]
) -> dict[str, list[argparse.Action]]:
    """Options by the title of their group, in the order of the groups.

    Args:
        actions: Options of ours.
        groups: As in `Command`. Options of no group come last, as ``other``.
    """
    titles = {name: title for title, names in groups.items() for name in names}
    found: dict[str, list[argparse.Action]] = {title: [] for title in (*groups, OTHER)}
    for action in actions:
        found[titles.get(action.dest.removeprefix(PREFIX), OTHER)].append(action)
    return {title: members for title, members in found.items() if members}
