"""A model's decoder layers, read from disk while they are used and released afterwards."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .layers import arrays, calls_replaced, decoder_layers, layer_index, quantizable, replace_calls
from .spill import Spill
from .taps import Use, tapped

#: Unevaluated copies of the model from which parameters are taken.
POOLS = 4


class Stream(Mapping[str, mx.array]):
    """Keeps a model's decoder layers on disk except for the one that runs.

    From then on each call of a layer reads its parameters, evaluates what it returns and drops
    them; `layer` keeps them for several calls. Modules around the layers are not changed.

    As a mapping it holds every module's weight in the dtype it is stored in, by module path: each
    look-up returns a new, unevaluated array.

    Attributes:
        spill: Disk space for results that are too large for memory.
    """

    def __init__(
        self,
        model: nn.Module,
        load: Callable[[], nn.Module],
        to_compute: Callable[[mx.array], mx.array],
        folder: Path,
    ):
        """Take the layers' parameters out of a model.

        Args:
            model: Not evaluated, in the dtype it is stored in.
            load: Loads the same model again, not evaluated.
            to_compute: Casts a parameter to the dtype to compute in.
            folder: Where temporary files may be written.
        """
        self.spill = Spill(folder)
        self._load, self._to_compute = load, to_compute
        self._layers = decoder_layers(model)
        self._prefixes = _prefixes(model, self._layers)
        self._held: set[int] = set()
        # A module that is also used outside of the layers stays in memory.
        every, inside = parameters(model), tuple(f"{p}." for p in self._prefixes)
        outer = {id(array) for path, array in every.items() if not path.startswith(inside)}
        self._own = [
            [path for path, a in every.items() if path.startswith(p) and id(a) not in outer]
            for p in inside
        ]
        self._dtypes = {path: to_compute(a).dtype for path, a in every.items()}
        self._weights = [p.removesuffix(".weight") for p in every if p.endswith(".weight")]
        self._pools = [{path: every[path] for own in self._own for path in own}]
        del every
        for index in range(len(self._layers)):
            self._clear(index)
        replace_calls(self._layers, self._call)

    def __getitem__(self, path: str) -> mx.array:
        return self._take(f"{path}.weight")

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """Keep a layer's parameters in memory while inside."""
        if index in self._held:
            yield
            return
        found = {path: self._to_compute(self._take(path)) for path in self._own[index]}
        self._put(index, found)
        del found
        self._held.add(index)
        try:
            yield
        finally:
            self._held.discard(index)
            self._clear(index)

    def _call(self, index: int, original: Any, args: tuple, kwargs: dict) -> Any:
        if index in self._held:
            return original(*args, **kwargs)
        with self.layer(index):
            output = original(*args, **kwargs)
            mx.eval(arrays(output))
        return output

    def _take(self, path: str) -> mx.array:
        """A parameter without other references, because an evaluated array keeps its memory."""
        for pool in self._pools:
            if path in pool:
                found = pool.pop(path)
                self._pools = [p for p in self._pools if p][-POOLS:]
                return found
        self._pools.append(parameters(self._load()))
        return self._pools[-1].pop(path)

    def _clear(self, index: int) -> None:
        # Computing with an empty array raises an error instead of giving a wrong result.
        self._put(index, {path: mx.zeros((0,), self._dtypes[path]) for path in self._own[index]})

    def _put(self, index: int, found: dict[str, mx.array]) -> None:
        start = len(self._prefixes[index]) + 1
        values = [(path[start:], array) for path, array in found.items()]
        self._layers[index].update(tree_unflatten(values))


def runs_whole(model: nn.Module) -> bool:
    """Whether a model uses its decoder layers by calling them, not parts of them.

    One token is run without evaluating anything.
    """
    index, running, whole = layer_index(model), 0, True

    def call(_: int, original: Any, args: tuple, kwargs: dict) -> Any:
        nonlocal running
        running += 1
        try:
            return original(*args, **kwargs)
        finally:
            running -= 1

    def see(use: Use) -> mx.array:
        nonlocal whole
        whole = whole and running > 0
        return use.outputs

    inner = {path: module for path, module in quantizable(model) if path in index}
    with calls_replaced(decoder_layers(model), call), tapped(inner, see):
        model(mx.array([[0]]))
    return whole


def parameters(model: nn.Module) -> dict[str, mx.array]:
    """All parameters by path."""
    found = tree_flatten(model.parameters())
    assert isinstance(found, list)
    return dict(found)


def _prefixes(model: nn.Module, layers: list[nn.Module]) -> list[str]:
    paths: dict[int, str] = {}
    for path, module in model.named_modules():
        paths.setdefault(id(module), path)
    return [paths[id(layer)] for layer in layers]
