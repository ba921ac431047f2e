"""What to say of an option of ours that a command does not have."""

import difflib
from collections.abc import Collection, Iterable, Mapping

START = "--optiq-"
#: How alike two names must be, from 0 to 1, for one to be suggested for the other.
ALIKE = 0.6


def suggestion(
    command: str, words: Iterable[str], options: Mapping[str, Collection[str]]
) -> str | None:
    """A sentence about the first of these words that is an option of ours.

    Args:
        command: The command that does not know the words; its name after ``mlx_lm.``.
        words: What its parser left over.
        options: Command -> its options that start with ``--optiq-``.

    Returns:
        Whose option it is or which one may be meant; None if no word is an option of ours.
    """
    unknown = (word.partition("=")[0] for word in words if word.startswith(START))
    name = next(unknown, None)
    if name is None:
        return None
    owners = [f"mlx_lm.{each}" for each, names in options.items() if name in names]
    if owners:
        return f"{name} is an option of {', '.join(owners)}, not of mlx_lm.{command}"
    missing = f"mlx_lm.{command} has no option {name}"
    if near := _nearest(name, options.get(command, ())):
        return f"{missing}: did you mean {near}?"
    if near := _nearest(name, {each for names in options.values() for each in names}):
        owner = next(each for each, names in options.items() if near in names)
        return f"{missing}: did you mean {near} of mlx_lm.{owner}?"
    return f"{missing}: mlx_lm.{command} --help lists them"


def _nearest(name: str, known: Iterable[str]) -> str | None:
    # Without what all names begin with, which would make any two alike.
    ends = [each.removeprefix(START) for each in sorted(known)]
    found = difflib.get_close_matches(name.removeprefix(START), ends, 1, ALIKE)
    return f"{START}{found[0]}" if found else None
