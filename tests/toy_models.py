"""Every architecture of the installed mlx-lm at toy size, with random weights."""

import importlib
import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.models
from mlx.utils import tree_map

TOYS = json.loads((Path(__file__).parent / "data" / "toy_configs.json").read_text())


def sources() -> dict[str, str]:
    """The modules of ``mlx_lm.models`` that define or import an architecture, as text."""
    folder = Path(mlx_lm.models.__path__[0])
    names = [module.name for module in pkgutil.iter_modules([str(folder)])]
    # Read, not imported: one of them ends the process if a package is missing.
    texts = {name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in names}
    return {name: text for name, text in texts.items() if re.search(r"\bModelArgs\b", text)}


FAMILIES = sources()
#: Before mlx-lm 0.32.1 phi3small writes outside of its logits, which may end the process.
UNSAFE = [name for name, text in FAMILIES.items() if "out[self._dummy_tokenizer_ids]" in text]

NO_METAL = "No Metal back-end"

#: Architecture -> how stock mlx-lm fails on it, and why.
UNSUPPORTED = {
    "bitnet": (NO_METAL, "its ternary layers are a Metal kernel, and packed already"),
    "muse_spark": (NO_METAL, "its attention and norms are Metal kernels"),
    "muse_spark_open": (NO_METAL, "the same, under its name in mlx-lm 0.32.1"),
    "olmo": ("^1$", "imports the package ai2-olmo, and ends the process without it"),
    "prism_hadamard_qwen35": (
        "Unsupported Hadamard pack",
        "exists only packed to 2 bits already, so there is nothing to convert",
    ),
}

if mlx_lm.__version__ == "0.30.6":
    UNSUPPORTED["deepseek_v32"] = ("name 'keys' is not defined", "a slip of this release")


def config(name: str) -> dict[str, Any]:
    """A toy config: what most families share, and what this one asks for."""
    own = TOYS["families"][name]
    if isinstance(own, str):
        return {**config(own), "model_type": name}
    own = {**own}
    inner = own.get("text_config")
    if isinstance(inner, str):
        own["text_config"] = config(inner)
    elif inner is not None:
        own["text_config"] = {**TOYS["common"], "model_type": name, **inner}
    return {**TOYS["common"], "model_type": name, **own}


def build(name: str, settings: dict[str, Any] | None = None) -> Any:
    """A toy with random weights in float32, the same each time; by default with its `config`."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(settings or config(name)))
    # Gates and gains that start at zero would hide what lies behind them.
    model.update(tree_map(_random_where_zero, model.parameters()))
    return model


def _random_where_zero(value: mx.array) -> mx.array:
    if not mx.issubdtype(value.dtype, mx.floating) or mx.any(value):
        return value
    return 0.05 * mx.random.normal(value.shape)
