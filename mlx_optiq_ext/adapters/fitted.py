"""An adapter that was checked against a model and is ready to be mounted."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import UnsupportedError
from ..lora import Adapter, LayerAdapter
from ..lora.fitting import fit_modules
from ..lora.geometry import geometry
from .mixture import check_scale
from .split import split_of


@dataclass(frozen=True)
class Fitted:
    """An adapter with the paths of one model.

    Attributes:
        source: The folder or Hub repository it came from.
        version: Digest of its tensors.
        layers: Updates of whole layers, by the model's paths.
    """

    source: str
    version: str
    layers: Mapping[str, LayerAdapter]


def most_tensors(model: nn.Module) -> int:
    """More tensors than an adapter of a model has, in any form: for every expert apart, too.

    An adapter is for the whole model, of which a rank may have a part only.
    """
    split = split_of(model)
    modules = dict(model.named_modules()) if split is None else split.modules
    shapes = [shape for each in modules.values() if (shape := geometry(each)) is not None]
    # Three for a matrix, which may be several in another form.
    return 3 * 4 * sum(shape.experts for shape in shapes)


def fit(adapter: Adapter, modules: Mapping[str, nn.Module]) -> Fitted:
    """Check an adapter against a model's modules by path.

    Raises:
        InputError: It is for another model.
        UnsupportedError: It is DoRA.
    """
    fitted = fit_modules(adapter, modules)
    if fitted.dora:
        raise UnsupportedError(
            f"{adapter.source} is a DoRA adapter, which cannot share a base model: serve it "
            "alone with --adapter-path, or train LoRA"
        )
    return Fitted(adapter.source, _version(fitted.layers), fitted.layers)


def rescaled(fitted: Fitted, scale: float) -> Fitted:
    """The adapter with its updates times a scale; other weights, and so another version.

    Raises:
        InputError: The scale is no finite number, or too large.
    """
    if check_scale(scale) == 1:
        return fitted
    layers = {p: replace(each, scale=each.scale * scale) for p, each in fitted.layers.items()}
    return Fitted(fitted.source, _version(layers), layers)


def _version(layers: Mapping[str, LayerAdapter]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path, layer in sorted(layers.items()):
        digest.update(f"{path} {layer.scale!r}".encode())
        for array in layer.arrays():
            digest.update(f"{array.shape} {array.dtype}".encode())
            digest.update(np.asarray(mx.contiguous(array).view(mx.uint8)).data)
    return digest.hexdigest()
