"""Bytes of a model's tensors, stored and read for one token."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import files
from ..model.config import generates, is_embedding, layer_count, text_config
from ..model.headers import Header, Headers, read_file, read_headers
from .caches import LayerCache, layer_caches

_HEADS = ("lm_head", "output", "embed_out", "head")
_PARTS = ("weight", "scales", "biases", "bias", "weight_scale_inv", "blocks")
#: Floating-point dtypes as safetensors and MLX name them.
_DTYPES = {
    **{"F32": "float32", "BF16": "bfloat16", "F16": "float16"},
    **{f"mlx.core.{name}": name for name in ("float32", "bfloat16", "float16")},
}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_EXPERT = re.compile(r"(experts)\.\d+\.")
#: Models whose RMSNorm adds one to its weight in a kernel of its own.
_SHIFTED_NORM = ("gemma", "gemma2", "gemma3", "gemma3_text")


#: Fields of a config that the prediction uses.
_NUMBERS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_kv_shared_layers"),
    *("num_attention_heads", "num_key_value_heads", "num_global_key_value_heads"),
    *("hidden_size", "n_embd", "head_dim", "global_head_dim", "sliding_window"),
    *("kv_lora_rank", "qk_rope_head_dim", "linear_num_value_heads", "linear_key_head_dim"),
    *("linear_value_head_dim", "mamba_num_heads", "mamba_head_dim", "ssm_state_size"),
    *("num_experts_per_tok", "experts_per_token", "top_k_experts", "moe_top_k", "moe_k"),
)


@dataclass(frozen=True)
class Operator:
    """One weight and the kernels that read it.

    Attributes:
        path: Layer path of its module.
        kind: ``"matmul"``, ``"expert"``, ``"embedding"`` (one row per token) or ``"vector"``.
        nbytes: Stored bytes, with scales and biases.
        elements: Weights in it.
        experts: How many it stacks; 0 if none.
        launches: Kernels per token.
        rows: Output rows, of one expert.
        quantized: Whether its products unpack it.
    """

    path: str
    kind: str
    nbytes: int
    elements: int
    experts: int = 0
    launches: int = 1
    rows: int = 0
    quantized: bool = False


@dataclass(frozen=True)
class Layout:
    """A model as input of the roofline.

    Attributes:
        operators: Every weight that text generation uses.
        caches: The cache of each layer.
        config: Config of the text model.
        nbytes: Bytes of all tensors that are loaded.
        dtype: Dtype of activations and unquantized caches, such as ``"bfloat16"``.
    """

    operators: tuple[Operator, ...]
    caches: tuple[LayerCache, ...]
    config: Mapping[str, Any]
    nbytes: int
    dtype: str = "bfloat16"

    @property
    def active_experts(self) -> int:
        """Experts that a token is routed to."""
        names = ("num_experts_per_tok", "experts_per_token", "top_k_experts", "moe_top_k", "moe_k")
        return next((int(self.config[name]) for name in names if self.config.get(name)), 1)

    @property
    def expert_layers(self) -> int:
        """Layers with routed experts."""
        return len({_layer_of(o.path) for o in self.operators if o.kind == "expert"})

    @property
    def element_bytes(self) -> int:
        """Bytes of an activation or an unquantized cache element."""
        return 4 if self.dtype == "float32" else 2


def read_layout(
    path_or_repo: str, *, adapter: str | None = None, revision: str | None = None
) -> Layout:
    """The layout of a folder or Hub repository, from its config and safetensors headers.

    Args:
        path_or_repo: As for ``mlx_lm.load``.
        adapter: Folder of a LoRA adapter to read beside the model.
        revision: Revision of the repository.

    Raises:
        InputError: There are no headers to read.
    """
    config, headers = read_headers(path_or_repo, revision)
    layout = layout_of(config, headers)
    if adapter is None:
        return layout
    low_rank = read_file(Path(adapter) / "adapters.safetensors")
    extra = tuple(
        # One kernel for each product, and one for the scaled sum.
        Operator(name, "matmul", h.nbytes, math.prod(h.shape), 0, 1 + name.endswith("lora_b"))
        for name, h in low_rank.items()
    )
    nbytes = layout.nbytes + sum(o.nbytes for o in extra)
    return replace(layout, operators=(*layout.operators, *extra), nbytes=nbytes)


def layout_of(config: Mapping[str, Any], headers: Headers) -> Layout:
    """The layout of a model by its config and the headers of its tensors.

    Raises:
        InputError: A field of the config that is needed is of another type than models have.
    """
    text = text_config(config)
    _check_fields(text, config)
    modules: dict[str, dict[str, list[Header]]] = defaultdict(lambda: defaultdict(list))
    for name, header in headers.items():
        if generates(name):
            path, part = _split(name)
            modules[_EXPERT.sub(r"\1.", path)][part].append(header)
    tied = not any(path.rpartition(".")[2] in _HEADS for path in modules)
    shifted = str(text.get("model_type")) in _SHIFTED_NORM
    operators = tuple(
        _operator(path, parts, config, tied=tied, shifted=shifted)
        for path, parts in modules.items()
    )
    rows: dict[int, dict[str, int]] = defaultdict(dict)
    for operator in operators:
        index = _layer_of(operator.path)
        if index is not None and index < (layer_count(text) or math.inf):
            rows[index][_LAYER.split(operator.path, maxsplit=1)[-1]] = operator.rows
    used = sum(o.nbytes for o in operators)
    return Layout(operators, layer_caches(text, rows), text, used, _dtype(modules, text))


def _dtype(modules: Mapping[str, Mapping[str, list[Header]]], config: Mapping[str, Any]) -> str:
    """Of the activations: what the embedding yields, widened by the layers' own norms.

    The config is asked last, since converters leave the original's dtype in it.
    """
    found = set()
    for path, parts in modules.items():
        own = _LAYER.split(f"{path}.", maxsplit=1)[-1]
        if is_embedding(path) or (path.endswith("norm") and own.count(".") == 1):
            headers = parts.get("scales") or parts.get("weight") or []
            found |= {_DTYPES[h.dtype] for h in headers if h.dtype in _DTYPES}
    if not found:
        found = {str(config.get("dtype") or config.get("torch_dtype"))}
    if "float32" in found or {"bfloat16", "float16"} <= found:
        return "float32"
    return "float16" if "float16" in found else "bfloat16"


def _check_fields(text: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    fields = files.Fields({k: v for k, v in text.items() if v is not None}, "config.json")
    for name in _NUMBERS:
        fields.integer(name, 0, 1 << 40, default=None)
    if not all(isinstance(kind, str) for kind in fields.items("layer_types", default=[])):
        raise fields.refusal("layer_types", "a list of strings")
    for name in ("quantization", "quantization_config"):
        settings = files.Fields(config, "config.json").table(name, default=None)
        if settings is not None and settings.entry.get("group_size") is not None:
            settings.integer("group_size", 0, 1 << 20)


def _split(name: str) -> tuple[str, str]:
    path, _, last = name.rpartition(".")
    return (path, last) if last in _PARTS else (name, "weight")


def _layer_of(path: str) -> int | None:
    match = _LAYER.search(f".{path}.")
    return None if match is None else int(match.group(1))


def _operator(
    path: str,
    parts: Mapping[str, list[Header]],
    config: Mapping[str, Any],
    *,
    tied: bool,
    shifted: bool,
) -> Operator:
    every = [header for headers in parts.values() for header in headers]
    nbytes = sum(header.nbytes for header in every)
    weights = parts.get("weight") or parts.get("blocks") or every
    shape = weights[0].shape
    experts = len(weights) if "experts." in f"{path}." and len(weights) > 1 else 0
    if len(shape) == 3 and "conv" not in path:
        experts = shape[0]
    name = path.rpartition(".")[2]
    if len(shape) < 2 or "conv" in path:
        launches = 1 + (shifted and name.endswith("norm"))
        return Operator(path, "vector", nbytes, sum(map(_size, weights)), 0, launches)
    elements, packed = _elements(path, parts, weights, config), "scales" in parts
    if is_embedding(path) and tied:
        # A row, and the head.
        return Operator(path, "matmul", nbytes, elements, 0, 2, shape[0], packed)
    if is_embedding(path) or ("per_layer" in name and "embed" in name):
        return Operator(path, "embedding", nbytes, elements, 0, 1, shape[0], packed)
    launches = 2 if "bias" in parts else 1
    kind = "expert" if experts else "matmul"
    return Operator(path, kind, nbytes, elements, experts, launches, shape[-2], packed)


def _size(header: Header) -> int:
    return math.prod(header.shape)


def _elements(
    path: str,
    parts: Mapping[str, list[Header]],
    weights: Iterable[Header],
    config: Mapping[str, Any],
) -> int:
    """Weights of a module; those of a quantized one are counted by its bits."""
    stored = sum(map(_size, weights))
    if "scales" not in parts:
        return stored
    settings = config.get("quantization") or config.get("quantization_config") or {}
    own = settings.get(path)
    bits = (own if isinstance(own, dict) else settings).get("bits")
    if not isinstance(bits, int) or bits < 1:
        groups = sum(map(_size, parts["scales"]))
        return groups * int(settings.get("group_size") or 64)
    return stored * 32 // bits
