"""Writing PEFT's form of an adapter."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ... import files
from ...errors import InputError
from ...model.config import is_embedding, ties_embeddings
from ..adapter import LayerAdapter
from .peft_reading import PREFIX


@dataclass(frozen=True)
class Naming:
    """PEFT's names of a model's layers, which are those of the Hugging Face model.

    Attributes:
        wrapped: Whether the checkpoint is a vision-language one, whose text model transformers
            keeps under ``model.language_model``.
        embeddings: Paths of embeddings.
        tied: Whether the head is the embedding.
    """

    wrapped: bool
    embeddings: tuple[str, ...] = ()
    tied: bool = False

    def path(self, path: str) -> str:
        """PEFT's path for mlx-lm's."""
        inner = path.removeprefix("language_model.")
        if inner == path or not self.wrapped:
            return inner
        return inner.replace("model.", "model.language_model.", 1)

    @classmethod
    def of(cls, config: Mapping[str, Any], paths: Iterable[str]) -> "Naming":
        """The naming for a base model.

        Args:
            config: The base model's ``config.json``, or nothing if it is not here.
            paths: Paths of the adapted layers.
        """
        architectures = config.get("architectures") or ["ForConditionalGeneration"]
        return cls(
            wrapped=any("ForConditionalGeneration" in name for name in architectures),
            embeddings=tuple(path for path in paths if is_embedding(path)),
            tied=ties_embeddings(config),
        )


def split(layers: Mapping[str, LayerAdapter], naming: Naming) -> tuple[dict, tuple[str, ...]]:
    """The layers that PEFT supports, under its names, and the paths of the others.

    PEFT has no LoRA for stacked experts, and its DoRA of embeddings differs from mlx-lm's.
    """
    kept, left_out = {}, []
    for path, layer in layers.items():
        if layer.stacked or (path in naming.embeddings and layer.magnitude is not None):
            left_out.append(path)
        else:
            kept[naming.path(path)] = layer
    return kept, tuple(left_out)


def tensors(kept: Mapping[str, LayerAdapter], naming: Naming) -> dict[str, mx.array]:
    """The tensors of ``adapter_model.safetensors``: transposed, under PEFT's names."""
    embeddings = {naming.path(path) for path in naming.embeddings}
    found = {}
    for path, layer in kept.items():
        stem = f"{PREFIX}{path}"
        first, second = mx.contiguous(layer.a.T), mx.contiguous(layer.b.T)
        if path in embeddings:
            found[f"{stem}.lora_embedding_A"] = first
            found[f"{stem}.lora_embedding_B"] = second
            if naming.tied:
                # mlx-lm applies the adapter of a tied embedding to the head too; PEFT does not.
                found[f"{PREFIX}lm_head.lora_A.weight"] = mx.contiguous(layer.b)
                found[f"{PREFIX}lm_head.lora_B.weight"] = mx.contiguous(layer.a)
            continue
        found[f"{stem}.lora_A.weight"], found[f"{stem}.lora_B.weight"] = first, second
        if layer.magnitude is not None:
            found[f"{stem}.lora_magnitude_vector"] = layer.magnitude
    return found


def config(
    ranks: Mapping[str, tuple[int, float]],
    naming: Naming,
    *,
    rank: int,
    base_model: str | None,
    dropout: float = 0.0,
    dora: bool = False,
) -> dict[str, Any]:
    """PEFT's keys of ``adapter_config.json``.

    Args:
        ranks: PEFT's path -> rank and scale. PEFT scales by alpha over rank.
        naming: See `Naming`.
        rank: Value of ``r``; each layer's own rank is in ``rank_pattern``.
        base_model: The base model's folder or name.
        dropout: Dropout during training.
        dora: Whether it is DoRA.
    """
    named = dict(ranks)
    for path in map(naming.path, naming.embeddings):
        if naming.tied and path in ranks:
            named["lm_head"] = ranks[path]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": next(iter(named.values()))[1] * rank,
        "target_modules": sorted(named),
        "rank_pattern": {path: each for path, (each, _) in named.items()},
        "alpha_pattern": {path: scale * each for path, (each, scale) in named.items()},
        "lora_dropout": dropout,
        "use_dora": dora,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def base_config(model: str | None) -> Mapping[str, Any]:
    """A base model's ``config.json`` if it is on this machine; otherwise empty."""
    if not model:
        return {}
    path = Path(model) / "config.json"
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache

        try:
            cached = try_to_load_from_cache(model, "config.json")
        except ValueError:
            return {}
        if not isinstance(cached, str):
            return {}
        path = Path(cached)
    try:
        found = files.read_json(path, files.MODEL_CONFIG)
    except InputError:
        return {}
    return found if isinstance(found, dict) else {}
