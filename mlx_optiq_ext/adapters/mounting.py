"""Mounting adapters on a model, and unmounting them."""

import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError, UnsupportedError
from ..lora import Adapter, read_adapter
from ..lora.geometry import EXPERTS, geometry
from . import stack as stacking
from .activation import Rows, Selection, registries, resolved
from .fitted import Fitted, fit, rescaled
from .layers import SPLIT, MountedExperts, mounted_layer
from .mixture import Mixture, MountedAdapter, adapters_in, check_scale
from .split import split_of
from .stack import Stack, Stacks

_NAME = "_optiq_adapters"


class Mounts:
    """The adapters on one model.

    A layer's adapters are replaced as a whole and rows keep the objects that they were given, so
    that a forward pass in another thread sees either all of an adapter or nothing of it.

    Attributes:
        model: The model.
        names: The adapters by name.
        changed: Held while adapters or their uses change; notified when a use ends.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.names: dict[str, MountedAdapter] = {}
        self.changed = threading.Condition()
        self._modules = dict(model.named_modules())
        self._split = split_of(model)
        self._layers: dict[str, Stacks] = {}
        self._placed: set[MountedAdapter] = set()
        self._uses: Counter[MountedAdapter] = Counter()
        registries.add(self)

    @property
    def paths(self) -> frozenset[str]:
        """Paths of the layers that adapters are on."""
        return frozenset(self._layers)

    def fit(self, adapter: Adapter) -> Fitted:
        """Check an adapter from `lora.read_adapter` against the model; any thread may.

        Raises:
            InputError: It is for another model.
            UnsupportedError: It is DoRA.
        """
        return fit(adapter, self._modules if self._split is None else self._split.modules)

    def mount(self, name: str, adapter: Adapter | Fitted, scale: float = 1.0) -> MountedAdapter:
        """Mount an adapter. It replaces one of the same name for new rows; old rows keep theirs.

        Args:
            name: The name that selects it.
            adapter: From `lora.read_adapter` or `fit`.
            scale: Factor of its updates.

        Returns:
            The mounted adapter; the existing one if the same weights have a name already.

        Raises:
            InputError: It is for another model, or the scale is unusable.
            UnsupportedError: It is DoRA, or cannot follow how the model is split over ranks.
        """
        fitted = rescaled(adapter if isinstance(adapter, Fitted) else self.fit(adapter), scale)
        for twin in list(self.names.values()):
            if twin.version == fitted.version:
                self.link(name, twin)
                self.sweep()
                return twin
        mounted = self.place(name, fitted)
        self.sweep()
        return mounted

    def place(self, name: str, fitted: Fitted) -> MountedAdapter:
        """Put an adapter on the model's layers under a name; if it fails, nothing is changed.

        Raises:
            UnsupportedError: It cannot follow how the model is split over ranks.
        """
        layers = fitted.layers
        if self._split is not None:
            layers = self._split.own(layers, self._modules)
        nbytes = sum(each.nbytes for layer in layers.values() for each in layer.arrays())
        mounted = MountedAdapter(name, fitted.version, fitted.source, nbytes)
        with self.changed:
            self._place({p: stacking.single(mounted, x) for p, x in layers.items()})
            self.names[name] = mounted
            self._placed.add(mounted)
        return mounted

    def link(self, name: str, adapter: MountedAdapter) -> None:
        """Give a mounted adapter one more name."""
        with self.changed:
            self.names[name] = adapter

    def sweep(self) -> None:
        """Unmount replaced adapters that no row uses any more."""
        with self.changed:
            for replaced in self._placed - set(self.names.values()):
                if not self._uses[replaced]:
                    self._take_off(replaced)

    def unmount(self, name: str) -> None:
        """Take a name away; layers without any adapter are the original modules again.

        Raises:
            InputError: There is no such name, or rows use the adapter and it has no other name.
        """
        with self.changed:
            adapter = self.names.get(name)
            if adapter is None:
                raise InputError(f"no adapter {name!r} is mounted on this model")
            if self._uses[adapter] and list(self.names.values()).count(adapter) == 1:
                raise InputError(f"adapter {name!r} is in use")
            del self.names[name]
            self.sweep()

    def discard(self, adapter: MountedAdapter) -> None:
        """Forget an adapter's names; unless rows use it, it is unmounted now."""
        with self.changed:
            for name in [name for name, each in self.names.items() if each is adapter]:
                del self.names[name]
            if adapter in self._placed and not self._uses[adapter]:
                self._take_off(adapter)

    def resolve(self, selection: Selection) -> MountedAdapter | Mixture | None:
        """What a selection is on this model, for a new row; None if all of it is on others.

        Raises:
            InputError: A part of a sum is on another model.
        """
        if isinstance(selection, str):
            return self.names.get(selection)
        found = resolved(selection, self.names)
        if isinstance(found, Rows) or not self._placed.intersection(adapters_in(found)):
            return None
        if not self._placed.issuperset(adapters_in(found)):
            raise InputError("a part of the sum of adapters is mounted on another model")
        return found

    def use(self, adapter: MountedAdapter) -> None:
        """Count a use, which keeps the adapter mounted until `done`."""
        with self.changed:
            self._uses[adapter] += 1

    def done(self, adapter: MountedAdapter) -> None:
        """End a use."""
        with self.changed:
            self._uses[adapter] -= 1
            if self._uses[adapter] <= 0:
                del self._uses[adapter]
            self.changed.notify_all()

    def uses(self, adapter: MountedAdapter) -> int:
        """How many rows and requests use an adapter."""
        return self._uses[adapter]

    def _place(self, new: Mapping[str, Stack]) -> None:
        """Add one adapter's layers; if it fails, the model stays as it was."""
        grown: dict[str, tuple[Stack, ...]] = {}
        for path, stack in new.items():
            layer = self._layers.get(path)
            grown[path] = stacking.added(() if layer is None else layer.stacks, stack)
            # One layer at a time, because the old and the new stack are both in memory.
            mx.eval([(each.a, each.b) for each in grown[path]])
        for path, stacks in grown.items():
            layer = self._layers.get(path)
            if layer is None:
                kind, layer = self._kind(path), Stacks(self.names)
                self._layers[path], layer.stacks = layer, stacks
                if kind == EXPERTS:
                    self._tell_rows(path.rpartition(".")[0])
                put(self.model, path, mounted_layer(self._modules[path], kind, layer))
            layer.stacks = stacks

    def _kind(self, path: str) -> str:
        if self._split is not None:
            return self._split.geometry(path).kind
        shape = geometry(self._modules[path])
        assert shape is not None  # fit_modules has refused layers without geometry
        return shape.kind

    def _take_off(self, adapter: MountedAdapter) -> None:
        self._placed.remove(adapter)
        for path, layer in list(self._layers.items()):
            rest = stacking.removed(layer.stacks, adapter)
            if rest != layer.stacks:
                mx.eval([(stack.a, stack.b) for stack in rest])
                layer.stacks = rest
            if not rest:
                self._restore(path)

    def _tell_rows(self, path: str) -> None:
        block = self._modules.get(path)
        if block is not None and not isinstance(at(self.model, path), MountedExperts):
            put(self.model, path, MountedExperts(block))

    def _restore(self, path: str) -> None:
        del self._layers[path]
        put(self.model, path, self._modules[path])
        parent = path.rpartition(".")[0]
        if not any(other.rpartition(".")[0] == parent for other in self._layers) and isinstance(
            at(self.model, parent), MountedExperts
        ):
            put(self.model, parent, self._modules[parent])


def prepare_model_for_mounted_lora(model: nn.Module) -> Mounts:
    """Freeze a model and keep a record of its adapters. Its modules stay until one is mounted.

    Raises:
        InputError: The model has LoRA layers already.
        UnsupportedError: It was split over ranks without ``mlx_lm.utils.sharded_load``.
    """
    mounts = mounts_on(model)
    if mounts is None:
        if split_of(model) is None and any(isinstance(each, SPLIT) for each in model.modules()):
            raise UnsupportedError(
                "adapters on a model that is split over ranks need mlx_lm.utils.sharded_load: load "
                "the model with it"
            )
        if any("lora_a" in module for module in model.modules()):
            raise InputError(
                "the model was loaded with an adapter (adapter_path): load it without, and mount "
                "that adapter too"
            )
        model.freeze()
        mounts = Mounts(model)
        object.__setattr__(model, _NAME, mounts)
    return mounts


def mounts_on(model: Any) -> Mounts | None:
    """The adapters on a model; None if it was never prepared."""
    return getattr(model, "__dict__", {}).get(_NAME)


def mount_adapter_on_model(
    model: nn.Module, adapter_id: str, path_or_repo: str | Path, scale: float = 1.0
) -> MountedAdapter:
    """Read an adapter in any form and mount it.

    Args:
        model: An mlx-lm model.
        adapter_id: The name for `AdapterActivation`.
        path_or_repo: A folder, or a repository on the Hub.
        scale: Factor of its updates, on top of the file's own.

    Raises:
        InputError: The files are missing or damaged, or for another model; the scale is unusable.
        UnsupportedError: It is DoRA.
    """
    check_scale(scale)
    mounts, adapter = prepare_model_for_mounted_lora(model), read_adapter(path_or_repo)
    return mounts.mount(adapter_id, adapter, scale)


def unmount(model: nn.Module, adapter_id: str) -> None:
    """Take an adapter off a model. After the last one the model's modules are the original ones.

    Raises:
        InputError: It is not mounted, or a batch uses it.
    """
    mounts = mounts_on(model)
    if mounts is None:
        raise InputError(f"no adapter {adapter_id!r} is mounted on this model")
    mounts.unmount(adapter_id)


def at(model: nn.Module, path: str) -> Any:
    """The module at a path of the model without adapters."""
    node: Any = model
    for step in path.split(".") if path else ():
        if isinstance(node, MountedExperts):
            node = node["experts"]
        node = node[int(step)] if isinstance(node, list | tuple) else node[step]
    return node


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set the module at a path of the model without adapters."""
    parent, _, last = path.rpartition(".")
    holder = at(model, parent) if parent else model
    if isinstance(holder, MountedExperts):
        holder = holder["experts"]
    holder[int(last) if isinstance(holder, list) else last] = module
