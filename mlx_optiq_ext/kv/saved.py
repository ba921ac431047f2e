"""Saved prompt caches with packed layers, checked before mlx-lm builds anything from them.

mlx-lm's file is a safetensors of the caches' arrays, named by their place in a tree (``0.1.2``: the
third of the second of the first cache), whose metadata is another such tree: the user's notes,
the caches' classes, and which arrays stand for scalars. A number in such a name makes a list of
that length.
Source: ``save_prompt_cache`` in mlx_lm/models/cache.py, ``tree_unflatten`` in mlx/utils.py.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .. import files
from ..errors import InputError
from .cache import PackedKVCache

#: Names of a place in a tree, one within the other.
DEPTH = 12
#: Places without an array in all lists together.
HOLES = 1024

#: What classes raise that are given another's state.
_FOREIGN = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def load(read: Callable[[], Any], path: Path) -> Any:
    """Load a saved prompt cache; one without packed layers as mlx-lm does.

    Args:
        read: mlx-lm's own loading of this file.
        path: The file.

    Raises:
        InputError: It has packed layers, and is damaged or does not fit this mlx-lm.
    """
    if not _has_header(path):
        return read()  # of what is no safetensors mlx-lm speaks itself
    header = files.read_header(path)
    if PackedKVCache.__name__ not in header.metadata.values():
        return read()
    _check_tree(header.tensors, f"{path}: tensors")
    _check_tree(header.metadata, f"{path}: metadata")
    try:
        return read()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except _FOREIGN as error:
        raise InputError(
            f"{path} does not fit this version of mlx-lm ({type(error).__name__}): save the prompt "
            "cache again"
        ) from error


def _has_header(path: Path) -> bool:
    try:
        with files.open_regular(path) as stream:
            return stream.read(9)[8:] == b"{"
    except InputError:
        return False


def _check_tree(names: Iterable[str], where: str) -> None:
    """Refuse names that do not make a tree whose lists have few holes.

    What holds no array, such as notes that nobody made or a cache that is empty, leaves a hole.
    """
    children: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        if len(parts) > DEPTH:
            raise InputError(f"{where} are nested deeper than those of any cache: save it again")
        for place in range(len(parts)):
            children.setdefault(".".join(parts[:place]), set()).add(parts[place])
    holes = 0
    for prefix, found in children.items():
        numbers = {number for part in found if (number := _place(part)) is not None}
        holes += max(numbers, default=-1) + 1 - len(numbers)
        if (numbers and (len(numbers) < len(found) or min(numbers) < 0)) or holes > HOLES:
            raise InputError(
                f"{where} of {files.shown(prefix)} do not make a list: save the prompt cache again"
            )


def _place(part: str) -> int | None:
    """The place in a list that MLX takes a name for, or None."""
    try:
        return int(part)
    except ValueError:
        return None
