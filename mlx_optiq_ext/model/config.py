"""Reads config.json of a text model, and knows Hugging Face's names of a model's parts."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

#: Keys that hold the text model's part of a multimodal config.
_NESTED = ("text_config", "llm_config", "language_config")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
#: Lists of layer types, in configs that have these instead of a layer count.
_KINDS = ("layer_types", "layers_block_type", "hybrid_override_pattern")

#: Modules and checkpoint prefixes for images, video or sound.
TOWERS = frozenset(
    {
        "audio_tower",
        "embed_audio",
        "embed_vision",
        "mm_projector",
        "multi_modal_projector",
        "patch_merge_mlp",
        "vision_adapter",
        "vision_embed_tokens",
        "vision_embedder",
        "vision_encoder",
        "vision_language_adapter",
        "vision_model",
        "vision_projection",
        "vision_tower",
        "visual",
    }
)
#: Modules of multi-token prediction, which mlx-lm leaves out.
_DRAFTING = frozenset(
    {"mtp", "mtp_block", "mtp_emb_norm", "mtp_hidden_norm", "mtp_layers", "mtp_linear_proj"}
)
#: Modules that look token embeddings up, as mlx-lm's models name them.
_EMBEDDINGS = frozenset(
    {
        "embed",
        "embed_in",
        "embed_tokens",
        "embedding",
        "embeddings",
        "tok_embeddings",
        "token_embeddings",
        "word_embeddings",
        "wte",
    }
)

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


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's part of a config.json; the whole of it if it has no such part.

    A nested part without a ``model_type`` has the wrapper's.
    """
    for name in _NESTED:
        if isinstance(config.get(name), Mapping):
            return {"model_type": config.get("model_type"), **config[name]}
    return dict(config)


def layer_count(config: Mapping[str, Any]) -> int | None:
    """Decoder layers of the text model, or None if the config does not say."""
    for part in (text_config(config), config):
        for name in _LAYERS:
            found = part.get(name)
            if isinstance(found, int) and not isinstance(found, bool):
                return found
        for name in _KINDS:
            if part.get(name):
                return len(part[name])
    return None


def convert_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that ``mlx_lm.convert`` casts to without ``--dtype``; None leaves all as stored.

    Like mlx-lm, this looks in two places only.
    """
    return config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding; a wrapper's key overrides that of its text part."""
    name = "tie_word_embeddings"
    return bool(config.get(name, text_config(config).get(name, False)))


def in_tower(name: str) -> bool:
    """Whether a tensor or module belongs to another modality than text."""
    return not TOWERS.isdisjoint(name.split("."))


def generates(name: str) -> bool:
    """Whether a tensor or module takes part when mlx-lm generates text."""
    return not in_tower(name) and _DRAFTING.isdisjoint(name.split("."))


def is_embedding(path: str) -> bool:
    """Whether a layer path is that of a token embedding."""
    return path.rpartition(".")[2] in _EMBEDDINGS


def place(name: str, known: AbstractSet[str] | Mapping[str, object]) -> str | None:
    """The model's path for a name that may be written with another wrapper's prefix.

    It takes the same time for any number of known paths.

    Args:
        name: Name of a module, or of its weight.
        known: The model's module paths.

    Returns:
        One of ``known``; None if none of them is meant, or several may be.
    """
    path = name.removesuffix(".weight")
    if path in known:
        return path
    tails = {path.removeprefix(f"{stem}.") for stem in _STEMS if path.startswith(f"{stem}.")}
    tails.add(path)
    candidates = {f"{stem}.{tail}" for stem in _STEMS for tail in tails} | tails
    found = [each for each in candidates if each in known]
    return found[0] if len(found) == 1 else None
