"""The part of an adapter that belongs on this rank of a model that mlx-lm has split.

Every architecture splits itself in its own way: by heads, by segments of a fused projection, by
experts. To find a layer's part, the whole model is built again without its weights. Each weight is
replaced by the numbers of its rows or columns, and the model is split once more. The numbers that
remain are the rows and columns of this rank.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import UnsupportedError
from ..lora import LayerAdapter
from ..lora.geometry import EMBEDDING, EXPERTS, Geometry, geometry

_NAME = "_optiq_split"


@dataclass(frozen=True)
class Share:
    """This rank's part of one layer; None stands for the whole axis.

    Attributes:
        inputs: Indices of its inputs.
        outputs: Indices of its outputs.
        experts: Indices of its experts.
    """

    inputs: mx.array | None = None
    outputs: mx.array | None = None
    experts: mx.array | None = None

    def of(self, layer: LayerAdapter) -> LayerAdapter:
        """This rank's part of a whole layer's update."""
        a, b = layer.a, layer.b
        # (experts, rank, in) and (experts, out, rank), or (in, rank) and (rank, out).
        into, out = (2, 1) if layer.stacked else (0, 1)
        if self.inputs is not None:
            a = mx.take(a, self.inputs, axis=into)
        if self.outputs is not None:
            b = mx.take(b, self.outputs, axis=out)
        if self.experts is not None:
            a, b = a[self.experts], b[self.experts]
        return LayerAdapter(a, b, layer.scale, layer.magnitude)


class Split:
    """How a model was split.

    Args:
        whole: Builds the unsplit model, with weights that are not read.
        split: Splits such a model by heads, as mlx-lm split the running one; None if that was
            split by layers.
    """

    def __init__(self, whole: Callable[[], nn.Module], split: Callable[[nn.Module], Any] | None):
        self._whole = whole
        self._split = split
        self._shares: dict[str, Share] = {}

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """The whole model's modules by path."""
        return dict(self._whole().named_modules())

    def geometry(self, path: str) -> Geometry:
        """The geometry of a whole layer that an adapter was fitted to."""
        shape = geometry(self.modules[path])
        assert shape is not None  # fit_modules refuses such layers
        return shape

    def own(
        self, layers: Mapping[str, LayerAdapter], present: Mapping[str, nn.Module]
    ) -> dict[str, LayerAdapter]:
        """This rank's part of an adapter.

        Args:
            layers: Updates of whole layers, by path.
            present: The modules that this rank has.

        Raises:
            UnsupportedError: A layer is split in a way that an update cannot follow.
        """
        here = {path: layer for path, layer in layers.items() if path in present}
        if self._split is None:
            return here
        self._look(path for path in here if path not in self._shares)
        return {path: self._shares[path].of(layer) for path, layer in here.items()}

    def _look(self, paths: Iterable[str]) -> None:
        wanted = list(paths)
        if not wanted:
            return
        shapes = {path: self.geometry(path) for path in wanted}
        outputs, inputs = self._kept(shapes, -2), self._kept(shapes, -1)
        stacks = {path: shape for path, shape in shapes.items() if shape.kind == EXPERTS}
        experts = self._kept(stacks, -3) if stacks else {}
        for path, shape in shapes.items():
            rows = _part(outputs[path], shape.outputs, path)
            columns = _part(inputs[path], shape.inputs, path)
            # Outputs may occur twice, if there are fewer heads than ranks.
            if len(set(inputs[path])) != len(inputs[path]):
                raise _not_followed(path)
            if shape.kind == EMBEDDING:
                rows = _part(outputs[path], shape.inputs, path)
                columns = _part(inputs[path], shape.outputs, path)
                if rows is not None or columns is not None:
                    raise UnsupportedError(
                        f"{path} is split over the ranks, and no adapter can be on a part of an "
                        "embedding: use one that leaves it out, or --pipeline"
                    )
            kept = _part(experts[path], shape.experts, path) if path in stacks else None
            self._shares[path] = Share(columns, rows, kept)

    def _kept(self, shapes: Mapping[str, Geometry], axis: int) -> dict[str, list[int]]:
        """Indices along an axis of each layer's weights that remain on this rank."""
        assert self._split is not None
        model = self._whole()
        modules = dict(model.named_modules())
        for path in shapes:
            module = modules[path]
            for name in {"weight", "scales"} & set(module):
                module[name] = _numbered(module[name].shape, axis)
        self._split(model)
        modules = dict(model.named_modules())
        return {path: _numbers(modules[path], axis) for path in shapes}


def _numbered(shape: tuple[int, ...], axis: int) -> mx.array:
    counts = mx.arange(shape[axis], dtype=mx.uint32)
    return mx.broadcast_to(counts.reshape(-1, *[1] * (-axis - 1)), shape)


def _numbers(module: Any, axis: int) -> list[int]:
    # Quantized weights have no column for each input; their scales have one for each group.
    array = module["scales" if "scales" in module else "weight"]
    index = [0] * array.ndim
    index[axis] = slice(None)  # pyright: ignore
    found: list[int] = array[tuple(index)].tolist()
    if axis == -1 and "scales" in module:
        size = module.group_size
        found = [number * size + offset for number in found for offset in range(size)]
    return found


def _part(numbers: list[int], count: int, path: str) -> mx.array | None:
    """The indices, or None if they are all of ``count`` in order."""
    if numbers == list(range(count)):
        return None
    if not all(0 <= number < count for number in numbers):
        raise _not_followed(path)
    return mx.array(numbers, dtype=mx.uint32)


def _not_followed(path: str) -> UnsupportedError:
    return UnsupportedError(
        f"this model splits {path} over the ranks in a way that an adapter cannot follow: use one "
        "that leaves it out, or --pipeline"
    )


def note_split(model: nn.Module, split: Split) -> None:
    """Store on a model how it was split."""
    object.__setattr__(model, _NAME, split)


def split_of(model: nn.Module) -> Split | None:
    """How a model was split; None if it is whole, or was split without `note_split`."""
    return getattr(model, "__dict__", {}).get(_NAME)
