"""Loads a model as mlx-lm does, casts it, and identifies it by a hash."""

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from ..errors import InputError
from .config import convert_dtype
from .hub import CONFIG, cached_folder

#: Files of which one at least makes a tokenizer.
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.*",
    "tekken.json",
    "*.tiktoken",
    "tiktoken.model",
    "tokenization_*.py",
)


def to_compute_dtype(array: mx.array) -> mx.array:
    """The dtype to compute in: float32 on a CPU, which emulates half precision."""
    if mx.default_device() == mx.Device(mx.cpu) and mx.issubdtype(array.dtype, mx.floating):
        return array.astype(mx.float32)
    return array


def to_compute(model: nn.Module, *, rounded: bool = False) -> nn.Module:
    """A model to compute with: on a CPU in float32 and dequantized, elsewhere as it is.

    Half precision and products with quantized weights are slow on a CPU.

    Args:
        model: Not evaluated; its parameters are replaced.
        rounded: Whether dequantized weights are rounded to the dtype of their scales, as
            ``mlx_lm.convert --dequantize`` rounds them. Otherwise scales and biases become float32
            before they are multiplied.
    """
    if mx.default_device() != mx.Device(mx.cpu):
        return model
    from mlx_lm.utils import dequantize_model

    if rounded:
        model = dequantize_model(model)
    model.update(tree_map(to_compute_dtype, model.parameters()))
    return model if rounded else dequantize_model(model)


def load_unquantized(
    path_or_repo: str,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any, str]:
    """Load a model as ``mlx_lm.convert`` does before it quantizes.

    Args:
        path_or_repo: A folder or a Hub repository.
        dtype: Value of ``mlx_lm.convert --dtype``.
        revision: Revision of the repository.
        trust_remote_code: Whether to run a repository's own code, as in mlx-lm.

    Returns:
        The model, not evaluated; its tokenizer; and a hash of its files and dtype.

    Raises:
        InputError: The model is quantized already, see `unpacked`.
    """
    model, tokenizer, config = load(path_or_repo, revision, trust_remote_code)
    try:
        unpacked(model)
    except InputError as error:
        raise InputError(f"{path_or_repo} {error}") from error
    cast(model, config, dtype)
    return model, tokenizer, f"{model_digest(cached_folder(path_or_repo, revision))}-{dtype}"


def reload(
    path_or_repo: str,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load the model of `load_unquantized` again, not evaluated."""
    model, _, config = load(path_or_repo, revision, trust_remote_code)
    unpacked(model)
    cast(model, config, dtype)
    return model


def unpacked(model: nn.Module) -> bool:
    """Give a model whose weights are published in 8-bit floating point plain weights.

    Most such checkpoints become plain while mlx-lm loads them. Those with a power of two for each
    32 weights stay packed, in MLX's mode mxfp8, every value of which bfloat16 holds exactly. What a
    config says of quantization does not count: ``mlx_lm.convert`` leaves it behind.

    Args:
        model: Not evaluated; its layers are replaced.

    Returns:
        Whether anything was packed.

    Raises:
        InputError: Something is quantized in another mode.
    """
    from mlx_lm.utils import dequantize_model

    packed = _packed(model)
    if all(module.get("scales") is not None and module.mode == "mxfp8" for module in packed):
        dequantize_model(model)
        if not _packed(model):
            return bool(packed)
    raise InputError("is quantized already: convert from its unquantized original")


def _packed(model: nn.Module) -> list[Any]:
    """The modules whose weights are integers, which floating-point numbers are packed in."""
    found = (module for _, module in model.named_modules())
    return [m for m in found if "weight" in m and not mx.issubdtype(m.weight.dtype, mx.floating)]


def load(
    path_or_repo: str, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[Any, Any, dict]:
    """The model, not evaluated, its tokenizer and its config, as ``mlx_lm.load`` returns them.

    Raises:
        InputError: There is no file to make a tokenizer of, and mlx-lm fails for it.
    """
    from mlx_optiq_compat import symbols

    try:
        return symbols.load(
            path_or_repo,
            lazy=True,
            return_config=True,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, TypeError, ValueError, AttributeError, ImportError) as error:
        folder = cached_folder(path_or_repo, revision)
        if any(path.exists() for name in TOKENIZERS for path in folder.glob(name)):
            raise
        raise InputError(
            f"{path_or_repo} has no tokenizer: put its tokenizer files (such as tokenizer.json) "
            "beside the weights"
        ) from error


def cast(model: nn.Module, config: dict, dtype: str | None) -> None:
    """Cast a loaded model's parameters as ``mlx_lm.convert`` does before it quantizes."""
    dtype = dtype or convert_dtype(config)
    if dtype not in ("float16", "bfloat16", "float32"):
        return
    keep: Callable[[str], bool] = getattr(model, "cast_predicate", lambda _: True)
    target = getattr(mx, dtype)

    def to_dtype(path: str, value: mx.array) -> mx.array:
        if keep(path) and mx.issubdtype(value.dtype, mx.floating):
            return value.astype(target)
        return value

    model.update(tree_map_with_path(to_dtype, model.parameters()))


def half_dtype(model: nn.Module) -> str | None:
    """The 16-bit dtype for the scales and biases of a float32 model.

    Scales and biases take the dtype of their weight: in float32 they take half a bit a weight more
    in groups of 64.

    Returns:
        The half type that most of the model's 16-bit parameters have, ``"bfloat16"`` if it has
        none, or None if most of its parameters have 16 bits already.
    """
    stored: Counter[mx.Dtype] = Counter()
    parameters = tree_flatten(model.parameters())
    assert isinstance(parameters, list)
    for _, array in parameters:
        stored[array.dtype] += array.size
    halves = {mx.bfloat16: "bfloat16", mx.float16: "float16"}
    if stored[mx.float32] <= sum(stored[dtype] for dtype in halves):
        return None
    return halves[max(halves, key=lambda dtype: stored[dtype])]


def model_digest(folder: Path) -> str:
    """Hash of a model folder's config and weights.

    All bytes are hashed, because a fine-tune may keep names, sizes and dates.
    """
    digest = hashlib.sha256()
    for path in model_files(folder):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def model_files(folder: Path) -> list[Path]:
    """A model folder's config and weights, as far as they are there."""
    every = [folder / CONFIG, *sorted(folder.glob("model*.safetensors"))]
    return [path for path in every if path.exists()]
