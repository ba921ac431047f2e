"""From a multimodal model to its text model."""

import copy
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import UnsupportedError
from ..model.config import in_tower
from .configuration import text_config
from .families import Family, find, is_multimodal
from .leftovers import tower_tensors

REMEDY = "add --optiq-keep-unused-modalities to convert it as mlx-lm does"


@dataclass(frozen=True)
class Report:
    """Report of what was left out.

    Attributes:
        wrapper: ``model_type`` that the checkpoint had.
        text: ``model_type`` that it has now.
        architectures: Before and after, or None if the checkpoint names none.
        keys: Keys of config.json that were removed.
        tensors: Bytes of each tensor that was left out; empty if no folder was given.
    """

    wrapper: str
    text: str
    architectures: tuple[list[str], list[str]] | None
    keys: tuple[str, ...]
    tensors: Mapping[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Total bytes of the tensors that were left out."""
        return sum(self.tensors.values())

    def summary(self) -> str:
        """One line for the terminal."""
        parts = [f"{len(self.keys)} config keys"]
        if self.tensors:
            megabytes = f"{self.bytes / 1e6:,.1f} MB"
            parts.insert(0, f"{len(self.tensors)} vision and audio tensors ({megabytes})")
        return (
            f"[optiq] Text only, as {self.text}: left out {', '.join(parts)} "
            "(--optiq-keep-unused-modalities keeps them)"
        )

    def entry(self) -> dict[str, Any]:
        """The entry for ``post_processing`` in optiq_metadata.json, with mlx-optiq's names."""
        names = self.architectures
        changed = self.text != self.wrapper
        return {
            "op": "strip_multimodal_metadata",
            "architectures": names and {"from": names[0], "to": names[1]},
            "model_type": {"from": self.wrapper, "to": self.text} if changed else None,
            "flattened_text_config": changed,
            "dropped_keys": list(self.keys),
            "dropped_tensors": len(self.tensors),
            "dropped_bytes": self.bytes,
        }


@dataclass(frozen=True)
class Text:
    """A text model.

    Attributes:
        model: The text model, unevaluated if the wrapper was.
        config: The model's config.json.
        report: Report of what was left out.
    """

    model: nn.Module
    config: dict[str, Any]
    report: Report


def to_text(model: nn.Module, config: dict[str, Any], folder: Path | None = None) -> Text | None:
    """Make a multimodal model into the text model that bare mlx-lm loads.

    The text model is built as mlx-lm builds it from the new config, and takes over the wrapper's
    tensors under their own names. So it holds exactly the tensors that mlx-lm expects, and its
    logits are those of the wrapper.

    Args:
        model: As ``mlx_lm.load`` returns it, lazy or not, quantized or not. Not changed.
        config: As ``mlx_lm.load(..., return_config=True)`` returns it. Not changed.
        folder: The checkpoint, to count the tensors that are left out.

    Returns:
        The text model, or None if the model is one already.

    Raises:
        UnsupportedError: The model has other modalities, but this package or the installed mlx-lm
            does not know its text model.
    """
    from mlx_optiq_compat import symbols

    family = _family(config)
    if family is None:
        return None
    original: Any = model
    weights = dict(tree_flatten(original.parameters()))
    module = _module(family)
    reads = symbols.model_arguments(module)
    config = copy.deepcopy(config)
    args = getattr(original.args, "text_config", None)
    new = text_config(config, family, copy.deepcopy(args), reads)
    keys = tuple(sorted(config.keys() - new.keys() - {"text_config"}))
    if not family.unwraps and not keys and not any(map(in_tower, weights)):
        return None
    report = Report(
        wrapper=config["model_type"],
        text=new["model_type"],
        architectures=(config["architectures"], new["architectures"])
        if "architectures" in config
        else None,
        keys=keys,
        tensors=tower_tensors(folder) if folder is not None else {},
    )
    return Text(_rebuilt(original, weights, family, module, new), new, report)


def handed_down(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that mlx-lm's class needs in ``text_config`` but the checkpoint has outside of it.

    Qwen3-VL MoE names ``tie_word_embeddings`` once, at the top of its config.json, and mlx-lm then
    refuses to load it.

    Args:
        config: config.json of a checkpoint.

    Returns:
        ``model_config`` for ``mlx_lm.load``; empty if no key is missing.

    Raises:
        UnsupportedError: As for `to_text`, before anything is loaded.
    """
    from mlx_optiq_compat import symbols

    family, nested, key = _family(config), config.get("text_config"), "tie_word_embeddings"
    if family is None or not family.unwraps or not nested or key in nested or key not in config:
        return {}
    if not symbols.model_arguments(_module(family)).get(key, False):
        return {}
    return {"text_config": {**nested, key: config[key]}}


def _family(config: Mapping[str, Any]) -> Family | None:
    family = find(config)
    if family is None and is_multimodal(config):
        name = config.get("model_type", "this model")
        raise _unsupported(name, "which of its parts are text is not known")
    return family


def _unsupported(model_type: str, why: str) -> UnsupportedError:
    from importlib import metadata

    version = metadata.version("mlx-lm")
    return UnsupportedError(
        f"{model_type} cannot be made text-only with mlx-lm {version}: {why}. For this model, "
        f"{REMEDY}"
    )


def _module(family: Family) -> ModuleType:
    from mlx_lm.utils import MODEL_REMAPPING

    name = MODEL_REMAPPING.get(family.text, family.text)
    try:
        return importlib.import_module(f"mlx_lm.models.{name}")
    except ImportError as error:
        raise _unsupported(family.wrapper, f"it has no model {name}") from error


def _rebuilt(
    wrapper: nn.Module,
    weights: Mapping[str, mx.array],
    family: Family,
    module: ModuleType,
    config: dict[str, Any],
) -> nn.Module:
    """The class that mlx-lm builds from ``config``, with the wrapper's tensors."""
    part = _part(wrapper, family)
    if part is not None and _is_model(part) and type(part) is not module.Model:
        raise _unsupported(family.wrapper, f"its text model is {type(part).__module__}")
    kept = {name: value for name, value in weights.items() if not in_tower(name)}
    foreign = [name for name in kept if not name.startswith(family.prefix)]
    if foreign:
        raise _unsupported(family.wrapper, f"{foreign[0]} is not a tensor of its text model")
    kept = {name.removeprefix(family.prefix): value for name, value in kept.items()}
    try:
        # ModelArgs fills in its defaults in place.
        text = module.Model(module.ModelArgs.from_dict(copy.deepcopy(config)))
        if hasattr(text, "sanitize"):
            kept = text.sanitize(kept)
        quantized = [
            (path.removeprefix(family.prefix), copy.copy(layer))
            for path, layer in wrapper.named_modules()
            if "scales" in layer and not in_tower(path)
        ]
        if quantized:
            text.update_modules(tree_unflatten(quantized))
        text.eval()
        text.load_weights(list(kept.items()), strict=True)
    except (KeyError, TypeError, ValueError) as error:
        raise _unsupported(family.wrapper, f"{module.__name__} differs ({error})") from error
    return text


def _part(wrapper: nn.Module, family: Family) -> nn.Module | None:
    """The wrapper's submodule that computes the logits."""
    return wrapper.get(family.prefix.rstrip(".")) if family.prefix else None


def _is_model(part: nn.Module) -> bool:
    """Whether a module is a model that mlx-lm can load by itself."""
    return type(part).__name__ == "Model"
