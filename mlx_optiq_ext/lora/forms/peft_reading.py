"""PEFT's form of a LoRA adapter.

Format: huggingface/peft, ``LoraConfig`` and the names of ``adapter_model.safetensors``. A matrix is
stored transposed to mlx-lm's: ``lora_A.weight`` (rank, in) and ``lora_B.weight`` (out, rank).
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ...errors import InputError
from ..adapter import LayerAdapter

PREFIX = "base_model.model."

#: Ends of tensor names -> part. An adapter's name may stand before ``weight``.
_NAME = re.compile(
    r"(?P<path>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.[^.]+)?(\.weight)?"
)
#: Settings that give a layer more than the two matrices, or matrices of another meaning.
_FOREIGN = (
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
#: Initializations that also change the base weights, which the adapter alone does not carry.
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def layers(
    tensors: Mapping[str, mx.array], config: Mapping[str, Any], source: str
) -> dict[str, LayerAdapter]:
    """Path -> update of an adapter stored by PEFT.

    Args:
        tensors: Of ``adapter_model.safetensors``.
        config: ``adapter_config.json``.
        source: For messages.

    Raises:
        InputError: It is no LoRA, or uses something that mlx-lm's LoRA layers do not have.
    """
    check_config(config, source)
    parts: dict[str, dict[str, mx.array]] = {}
    other = []
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name.removeprefix(PREFIX))
        if match is None or name.endswith(".bias"):
            other.append(name)
            continue
        parts.setdefault(match["path"], {})[match["part"]] = tensor
    # PEFT stores a copy of the base weight beside an adapted embedding.
    copies = {f"{PREFIX}{path}.base_layer.weight" for path in parts}
    if rest := sorted(set(other) - copies):
        raise InputError(
            f"{source}: {rest[0]} is no LoRA tensor (modules_to_save, bias and the like): mlx-lm "
            "has no place for it; merge it into the base model with PEFT"
        )
    return {path: _layer(path, parts[path], config, source) for path in sorted(parts)}


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Refuse a config that describes something other than LoRA or DoRA."""
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{source}: peft_type {config.get('peft_type')!r} is not LORA, the one that mlx-lm has"
        )
    for name in ("r", "lora_alpha"):
        _number(config.get(name), name, source)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_BASE):
        raise InputError(
            f"{source}: init_lora_weights {start!r} changed the base model too: convert the "
            "adapter to plain LoRA with PEFT (path_initial_model_for_weight_conversion)"
        )
    for name in _FOREIGN:
        if config.get(name):
            raise InputError(f"{source}: {name} is set, which mlx-lm's LoRA layers do not have")
    for name in ("rank_pattern", "alpha_pattern"):
        table = config.get(name) or {}
        if not isinstance(table, dict):
            raise InputError(f"{source}: {name} is not a table of module to number")
        for key, value in table.items():
            _number(value, f"{name} of {key}", source)


def pattern_value(table: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """What a ``rank_pattern`` or ``alpha_pattern`` says of a path: the first key that fits."""
    for key, value in (table or {}).items():
        if matches(key, path):
            return value
    return default


def matches(key: str, path: str) -> bool:
    """Whether a pattern's key, a regular expression or the end of a path, fits a path.

    Raises:
        InputError: The key is no regular expression.
    """
    try:
        return re.match(rf"(.*\.)?({key})$", path) is not None
    except re.error as error:
        raise InputError(f"pattern {key!r} is no regular expression ({error})") from error


def _layer(
    path: str, parts: Mapping[str, mx.array], config: Mapping[str, Any], source: str
) -> LayerAdapter:
    first, second = parts.get("lora_A"), parts.get("lora_B")
    if first is None and second is None:
        first, second = parts.get("lora_embedding_A"), parts.get("lora_embedding_B")
    if first is None or second is None:
        raise InputError(f"{source}: {path} has one of two LoRA matrices: the file is incomplete")
    if first.ndim != 2 or second.ndim != 2 or first.shape[0] != second.shape[1]:
        raise InputError(
            f"{source}: {path} has matrices {first.shape} and {second.shape}, which are no LoRA of "
            "a linear layer"
        )
    rank = first.shape[0]
    said = pattern_value(config.get("rank_pattern"), path, config["r"])
    if rank != said:
        raise InputError(
            f"{source}: {path} has rank {rank}, but adapter_config.json says {said}: the two files "
            "are of different adapters"
        )
    alpha = pattern_value(config.get("alpha_pattern"), path, config["lora_alpha"])
    scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    magnitude = parts.get("lora_magnitude_vector")
    return LayerAdapter(
        first.T, second.T, scale, None if magnitude is None else magnitude.reshape(-1)
    )


def _number(value: Any, name: str, source: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise InputError(
            f"{source}: {name} in adapter_config.json is {value!r}: give a number above 0"
        )
