"""Keeps arrays on disk until they are needed, for models larger than memory."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from .replay import Call

Arrays = dict[str, mx.array]


class Spill:
    """A temporary folder of arrays; reading returns new, unevaluated arrays.

    The folder is removed with this object.
    """

    def __init__(self, beside: Path):
        beside.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(prefix="spill.", dir=beside)
        self._count = 0

    def path(self) -> Path:
        """The path of a new file."""
        self._count += 1
        return Path(self._folder.name) / f"{self._count}.safetensors"

    def write(self, arrays: Arrays, path: Path | None = None) -> Path:
        """Write arrays to a new file."""
        path = path or self.path()
        mx.save_safetensors(str(path), arrays)
        return path


def read(path: Path) -> Arrays:
    """Read a file of `write` as new, unevaluated arrays."""
    found: Any = mx.load(str(path))
    return found


class Spilled(Mapping[str, Arrays]):
    """Named groups of arrays on disk, written some groups at a time."""

    def __init__(self, spill: Spill):
        self._spill = spill
        self._files: dict[str, Path] = {}

    def add(self, groups: Mapping[str, Arrays]) -> None:
        """Write some groups."""
        if groups:
            flat = {f"{g} {name}": a for g, part in groups.items() for name, a in part.items()}
            path = self._spill.write(flat)
            self._files.update(dict.fromkeys(groups, path))

    def __getitem__(self, group: str) -> Arrays:
        return _group(read(self._files[group]), group)

    def items(self) -> Any:
        """All groups; those of one file share an open file."""
        opened: dict[Path, Arrays] = {}
        for group, path in self._files.items():
            if path not in opened:
                opened = {path: read(path)}
            yield group, _group(opened[path], group)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _group(arrays: Arrays, group: str) -> Arrays:
    split = {path: path.rpartition(" ") for path in arrays}
    return {name: arrays[path] for path, (found, _, name) in split.items() if found == group}


class SpilledPacked(Mapping[str, tuple[mx.array, ...]]):
    """Quantized weights, scales and biases on disk, by tensor path."""

    def __init__(self, spill: Spill):
        self._groups = Spilled(spill)

    def update(self, found: Mapping[str, tuple[mx.array, ...]]) -> None:
        """Write some tensors."""
        self._groups.add({k: {str(i): a for i, a in enumerate(p)} for k, p in found.items()})

    def __getitem__(self, path: str) -> tuple[mx.array, ...]:
        return _packed(self._groups[path])

    def items(self) -> Any:
        """All tensors; those of one block share an open file."""
        for path, found in self._groups.items():
            yield path, _packed(found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)


def _packed(found: Arrays) -> tuple[mx.array, ...]:
    return tuple(found[str(number)] for number in range(len(found)))


@dataclass(frozen=True)
class _Kept:
    """A reference to an array on disk."""

    path: Path
    name: str


class SpilledRecording(Sequence[Call]):
    """A recording whose arrays are on disk."""

    def __init__(self, spill: Spill):
        self._spill = spill
        self._calls: list[Call] = []

    def append(self, call: Call) -> None:
        """Write a call; arrays that are exactly the last call's output are written once."""
        arrays: Arrays = {}
        path = self._spill.path()

        def keep(leaf: Any) -> Any:
            if not isinstance(leaf, mx.array):
                return leaf
            arrays[str(len(arrays))] = leaf
            return _Kept(path, str(len(arrays) - 1))

        args = call.args
        if call.follows and self._calls:
            args = (self._calls[-1].hidden_out, *args[1:])
        args, kwargs, output = _mapped(keep, (args, call.kwargs, call.output))
        self._spill.write(arrays, path)
        self._calls.append(Call(args, kwargs, output, call.index, call.follows))

    @overload
    def __getitem__(self, index: int) -> Call: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Call]: ...
    def __getitem__(self, index: int | slice) -> Call | Sequence[Call]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        opened: dict[Path, Arrays] = {}

        def fetch(leaf: Any) -> Any:
            if not isinstance(leaf, _Kept):
                return leaf
            if leaf.path not in opened:
                opened[leaf.path] = read(leaf.path)
            return opened[leaf.path][leaf.name]

        call = self._calls[index]
        args, kwargs, output = _mapped(fetch, (call.args, call.kwargs, call.output))
        return Call(args, kwargs, output, call.index, call.follows)

    def __len__(self) -> int:
        return len(self._calls)


def _mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    return tree_map(function, tree, is_leaf=nn.Module.is_module)
