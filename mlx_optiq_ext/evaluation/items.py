"""Test items of a task, one JSON object a line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .. import files
from ..errors import InputError

Item = TypeVar("Item")


def read_lines(path: Path, item: Callable[[str, Any], Item], needs: str) -> list[Item]:
    """The items of a ``.jsonl`` file.

    Args:
        path: The file.
        item: Makes an item from a line's place, for messages, and its JSON object.
        needs: The fields that a line must have, in words.

    Raises:
        InputError: The file is missing, empty, or a line is wrong; the message names it.
    """
    found = []
    for number, line in files.read_lines(path):
        where = f"{path}, line {number}"
        try:
            found.append(item(where, files.parse_json(line, where, files.REQUEST)))
        except InputError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{where} has no {needs}") from error
    if not found:
        raise InputError(f"the data file {path} is empty: each line needs {needs}")
    return found
