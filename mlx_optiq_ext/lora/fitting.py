"""Checks that an adapter fits a model, and maps its layers to the model's."""

import dataclasses
from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError
from ..model.config import is_embedding, place
from .adapter import PEFT, Adapter, LayerAdapter
from .geometry import EMBEDDING, geometry


def fit(adapter: Adapter, model: nn.Module) -> Adapter:
    """Check an adapter against a model.

    Args:
        adapter: From `read_adapter`.
        model: Without LoRA layers.

    Returns:
        The adapter with the model's own layer paths.

    Raises:
        InputError: The adapter is for another model: a layer is missing, or has another shape.
    """
    return fit_modules(adapter, dict(model.named_modules()))


def adaptable(model: nn.Module) -> set[str]:
    """Paths of a model's modules that have a weight."""
    return {path for path, module in model.named_modules() if "weight" in module}


def fit_modules(adapter: Adapter, modules: Mapping[str, nn.Module]) -> Adapter:
    """Like `fit`, with the model's modules by path, without LoRA layers."""
    known = {path for path, module in modules.items() if "weight" in module}
    layers: dict[str, LayerAdapter] = {}
    stored_layers = adapter.layers
    tied = not any(path.rpartition(".")[2] == "lm_head" for path in known)
    if tied and adapter.form == PEFT:
        stored_layers = without_twin(stored_layers, adapter.source)
    for stored, layer in stored_layers.items():
        path = place(stored, known)
        if path is None:
            raise InputError(
                f"{adapter.source} adapts {stored}, which this model does not have: was it trained "
                f"on another one{_trained_on(adapter)}?"
            )
        if path in layers:
            raise InputError(f"{adapter.source} adapts {path} twice, under two names")
        shape = geometry(modules[path])
        if shape is None:
            raise InputError(
                f"{adapter.source} adapts {path}, a {type(modules[path]).__name__}, which LoRA "
                "cannot adapt in mlx-lm"
            )
        if layer.rank > max(shape.inputs, shape.outputs):
            raise InputError(
                f"{adapter.source} has rank {layer.rank} for {path}, which is larger than that "
                f"{shape.kind} ({shape.inputs} to {shape.outputs}): is the file another model's?"
            )
        magnitude = layer.magnitude
        if not shape.holds(layer) or (
            magnitude is not None
            and magnitude.shape != ((shape.inputs if shape.kind == EMBEDDING else shape.outputs),)
        ):
            first, second = shape.shapes(layer.rank)
            raise InputError(
                f"{adapter.source} does not fit {path}: it has {layer.a.shape} and "
                f"{layer.b.shape}, but the {shape.kind} needs {first} and {second}: was it trained "
                f"on another model{_trained_on(adapter)}?"
            )
        layers[path] = layer
    return dataclasses.replace(adapter, layers=layers)


def without_twin(layers: Mapping[str, LayerAdapter], source: str) -> dict[str, LayerAdapter]:
    """The layers of a PEFT adapter without the head's, for a tied model.

    mlx-lm applies an embedding's adapter to the head that is tied to it; PEFT adapts the two apart.
    They agree where the head's is the embedding's transposed, as our PEFT form has it.

    Raises:
        InputError: They do not agree.
    """
    head = layers.get("lm_head")
    kept = {path: layer for path, layer in layers.items() if path != "lm_head"}
    embedding = [layer for path, layer in kept.items() if is_embedding(path)]
    twins = (
        head is not None
        and len(embedding) == 1
        and head.scale == embedding[0].scale
        and mx.array_equal(head.a, embedding[0].b.T).item()
        and mx.array_equal(head.b, embedding[0].a.T).item()
    )
    if not twins and (head is not None or embedding):
        raise InputError(
            f"{source} adapts the embedding or the head of a model that has one matrix for both: "
            "mlx-lm would adapt both at once. Train without them"
        )
    return kept


def _trained_on(adapter: Adapter) -> str:
    return f" ({adapter.base_model})" if adapter.base_model else ""
