"""Test items of a task, one JSON object a line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InputError

Item = TypeVar("Item")


def read_lines(path: Path, item: Callable[[str, Any], Item], needs: str) -> list[Item]:
    """The items of a ``.jsonl`` file.

    Args:
        path: The file.
        item: Makes one of where a line is, for messages, and what it holds.
        needs: What a line must hold.

    Raises:
        InputError: The file is missing, empty, or a line is wrong; the message names it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the data file {path} ({error})") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            found.append(item(where, json.loads(line)))
        except InputError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{where} has no {needs}") from error
    if not found:
        raise InputError(f"the data file {path} is empty: each line needs {needs}")
    return found
