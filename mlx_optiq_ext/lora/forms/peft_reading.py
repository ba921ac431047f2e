"""PEFT's form of a LoRA adapter.

Format: huggingface/peft, ``LoraConfig`` and the names of ``adapter_model.safetensors``. A matrix is
stored transposed to mlx-lm's: ``lora_A.weight`` (rank, in) and ``lora_B.weight`` (out, rank).
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import mlx.core as mx

from ...errors import InputError
from ...files import shown
from ..adapter import LayerAdapter
from . import patterns
from .location import HIGHEST_SCALE

PREFIX = "base_model.model."

#: Ends of tensor names -> part. An adapter's name may stand before ``weight``.
_NAME = re.compile(
    r"(?P<path>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.[^.]+)?(\.weight)?"
)
#: Settings that add more than the two matrices, or change their meaning.
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
#: Initializations that also change the base weights, which the adapter does not contain.
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def layers(
    tensors: Mapping[str, mx.array], config: Mapping[str, Any], source: str
) -> dict[str, LayerAdapter]:
    """Path -> update of an adapter stored by PEFT.

    Args:
        tensors: Tensors of ``adapter_model.safetensors``.
        config: ``adapter_config.json``.
        source: For messages.

    Raises:
        InputError: The adapter is not a LoRA, or uses something that mlx-lm's LoRA layers lack.
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
    ranks = _by_path("rank_pattern", parts, config, config["r"], source)
    alphas = _by_path("alpha_pattern", parts, config, config["lora_alpha"], source)
    rooted = bool(config.get("use_rslora"))
    return {
        path: _layer(path, parts[path], ranks[path], alphas[path], rooted, source)
        for path in sorted(parts)
    }


def _by_path(
    name: str, paths: Collection[str], config: Mapping[str, Any], default: Any, source: str
) -> dict[str, Any]:
    """The value of a ``rank_pattern`` or ``alpha_pattern`` for each path."""
    table = config.get(name) or {}
    fits = patterns.first_fits(table, paths, f"{source}: {name}")
    values = list(table.values())
    return {path: values[fits[path]] if path in fits else default for path in paths}


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Refuse a config that describes something other than LoRA or DoRA."""
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{source}: peft_type {shown(config.get('peft_type'))} is not LORA, the one that "
            "mlx-lm has"
        )
    _number(config.get("r"), "r", source, whole=True)
    _number(config.get("lora_alpha"), "lora_alpha", source)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_BASE):
        raise InputError(
            f"{source}: init_lora_weights {shown(start)} changed the base model too: convert the "
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
            _number(value, f"{name} of {key:.100}", source, whole=name == "rank_pattern")


def _layer(
    path: str,
    parts: Mapping[str, mx.array],
    said: Any,
    alpha: Any,
    rooted: bool,
    source: str,
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
    if rank != said:
        raise InputError(
            f"{source}: {path} has rank {rank}, but adapter_config.json says {said}: the two files "
            "are of different adapters"
        )
    scale = float(alpha) / (math.sqrt(rank) if rooted else rank)
    if scale > HIGHEST_SCALE:
        raise InputError(
            f"{source}: {path} has lora_alpha {shown(alpha)} at rank {rank} in "
            f"adapter_config.json: a scale is at most {HIGHEST_SCALE:g}"
        )
    magnitude = parts.get("lora_magnitude_vector")
    return LayerAdapter(
        first.T, second.T, scale, None if magnitude is None else magnitude.reshape(-1)
    )


def _number(value: Any, name: str, source: str, *, whole: bool = False) -> None:
    if type(value) not in ((int,) if whole else (int, float)) or not 0 < value < 1 << 53:
        raise InputError(
            f"{source}: {name} in adapter_config.json is {shown(value)}: give a "
            f"{'whole ' if whole else ''}number above 0"
        )
