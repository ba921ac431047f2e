"""Whether an adapter is for a model, and which of the model's layers it means."""

import dataclasses
from collections.abc import Collection, Mapping

import mlx.nn as nn

from ..errors import InputError
from .adapter import PEFT, Adapter, LayerAdapter
from .geometry import EMBEDDING, geometry

#: What may stand before ``layers.0`` where a checkpoint has been wrapped or unwrapped. The text
#: model of a vision-language checkpoint has each of these names somewhere.
_STEMS = (
    "model",
    "language_model.model",
    "model.language_model",
    "model.language_model.model",
    "model.text_model",
    "language_model",
    "transformer",
    "backbone",
)


def fit(adapter: Adapter, model: nn.Module) -> Adapter:
    """Check an adapter against a model.

    Args:
        adapter: From `read_adapter`.
        model: Without LoRA layers.

    Returns:
        The adapter with the model's own layer paths.

    Raises:
        InputError: It is for another model: a layer is missing, or has another shape.
    """
    modules = dict(model.named_modules())
    known = {path for path, module in modules.items() if "weight" in module}
    layers: dict[str, LayerAdapter] = {}
    for stored, layer in adapter.layers.items():
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
    if adapter.form == PEFT:
        layers = _tied(adapter, layers, modules)
    return dataclasses.replace(adapter, layers=layers)


def place(path: str, known: Collection[str]) -> str | None:
    """The model's path for one that may be written with another wrapper's prefix."""
    if path in known:
        return path
    tails = {path.removeprefix(f"{stem}.") for stem in _STEMS if path.startswith(f"{stem}.")}
    tails.add(path)
    candidates = {f"{stem}.{tail}" for stem in _STEMS for tail in tails} | tails
    found = sorted(candidates & set(known))
    return found[0] if len(found) == 1 else None


def _tied(
    adapter: Adapter, layers: Mapping[str, LayerAdapter], modules: Mapping[str, nn.Module]
) -> dict[str, LayerAdapter]:
    """Refuse an embedding's adapter where mlx-lm would apply it to a tied head too."""
    tied = not any(path.rpartition(".")[2] == "lm_head" for path in modules)
    for path in layers:
        if tied and isinstance(modules[path], nn.Embedding | nn.QuantizedEmbedding):
            raise InputError(
                f"{adapter.source} adapts {path}, which is this model's head too: PEFT leaves the "
                "head alone and mlx-lm would not. Train without the embeddings"
            )
    return dict(layers)


def _trained_on(adapter: Adapter) -> str:
    return f" ({adapter.base_model})" if adapter.base_model else ""
