"""The config.json of a text model, made from its wrapper's."""

from collections.abc import Collection
from dataclasses import asdict, is_dataclass
from typing import Any

from .families import Family, is_modal

#: Keys of a wrapper that concern its text model.
CARRIED = (
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "quantization",
    "quantization_config",
    "quantize_activations",
    "tie_word_embeddings",
    "transformers_version",
)


def text_config(config: dict[str, Any], family: Family, args: Any, reads: Collection[str]) -> dict:
    """Build the text model's config.

    Args:
        config: The wrapper's config, as ``mlx_lm.load(..., return_config=True)`` returns it.
        family: Its row.
        args: ``text_config`` of the wrapper's ``ModelArgs``, including its defaults.
        reads: Field names of the text model's ``ModelArgs``.

    Returns:
        A new config without the keys of other modalities.
    """
    if not family.unwraps:
        text = {key: value for key, value in config.items() if not is_modal(key)}
    else:
        text = _effective(config, args)
        # Keys that the text model reads but the wrapper did not pass on would change the model.
        text |= {k: config[k] for k in CARRIED if k in config and k not in reads}
        text["model_type"] = family.text
        # auto_map names remote code; loading the tokenizer would ask to run it.
        text.pop("auto_map", None)
        # mlx_lm.convert looks for a dtype under these two names only.
        dtype = config.get("torch_dtype") or text.get("dtype")
        if dtype:
            text["torch_dtype"] = dtype
        for key in ("quantization", "quantization_config"):
            if isinstance(text.get(key), dict):
                text[key] = {k.removeprefix(family.prefix): v for k, v in text[key].items()}
    if "architectures" in config:
        text["architectures"] = [family.architecture]
    return text


def _effective(config: dict[str, Any], args: Any) -> dict[str, Any]:
    """The text part of a config as the wrapper reads it."""
    nested = config.get("text_config")
    if nested is None:  # old Qwen-VL configs are flat, with vision_config among the text keys
        return {key: value for key, value in config.items() if not is_modal(key)}
    if is_dataclass(args) and not isinstance(args, type):
        return {**asdict(args), **nested}
    return {**nested, **(args if isinstance(args, dict) else {})}
