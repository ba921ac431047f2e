"""Run ``mlx_lm.dynamic_quant``, ``mlx_lm.gptq`` or ``mlx_lm.dwq`` on given calibration tokens.

    python mlx_lm_quant.py (dynamic_quant | gptq | dwq) WINDOWS.npz ARGUMENT...

The arguments are the command's own. Two things differ from the command, both in its favour. Its
calibration text is downloaded, which a machine without a network cannot: the given tokens take its
place. And where the command runs the model, it does so in float32 on a CPU, since half precision
is emulated there; what it writes keeps the model's own dtype. dwq, which wants more samples than a
text has, gets pieces of it that begin anywhere; the last twentieth of the text is for its own
validation only.
"""

import importlib
import sys
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

#: Which of our windows a command gets: planning as our plans, rounding as our refinement.
WINDOWS = {"dynamic_quant": "planning", "gptq": "refining"}


def cast(model: Any, dtype: mx.Dtype) -> None:
    """Cast a model's floating-point parameters; embeddings, which are only packed, stay."""

    def convert(path: str, value: mx.array) -> mx.array:
        floating = mx.issubdtype(value.dtype, mx.floating)
        return value.astype(dtype) if floating and "embed" not in path else value

    model.update(tree_map_with_path(convert, model.parameters()))


def in_float32(function: Any) -> Any:
    """The function with its first argument, a model, in float32 while it runs on a CPU."""

    def call(model: Any, *args: Any, **kwargs: Any) -> Any:
        if mx.default_device() != mx.Device(mx.cpu):
            return function(model, *args, **kwargs)
        parameters: Any = tree_flatten(model.parameters())
        stored = next(value.dtype for path, value in parameters if "embed" not in path)
        cast(model, mx.float32)
        found = function(model, *args, **kwargs)
        cast(model, stored)
        return found

    return call


Samples = list[tuple[list[int], int]]


def pieces(text: np.ndarray, length: int, count: int, valid: int = 32) -> tuple[Samples, Samples]:
    """Samples of a text to train and to validate on, as dwq takes them.

    Args:
        text: (tokens,).
        length: Tokens of a sample.
        count: Samples to train on.
        valid: Samples to validate on.
    """
    rng = np.random.default_rng(0)
    cut = len(text) - max(len(text) // 20, length + 1)

    def drawn(part: np.ndarray, number: int) -> Samples:
        starts = rng.integers(0, len(part) - length, number)
        return [(part[start : start + length].tolist(), 0) for start in starts]

    return drawn(text[:cut], count), drawn(text[cut:], valid)


def main() -> None:
    """Put the tokens in place and hand over to the command."""
    name, windows, *arguments = sys.argv[1:]
    arrays = np.load(windows)
    command: Any = importlib.import_module(f"mlx_lm.quant.{name}")
    if name == "dwq":
        text = arrays["text"]
        command.load_data = lambda tokenizer, path, count, length: pieces(text, length, count)
    else:
        tokens = mx.array(arrays[WINDOWS[name]])
        command.load_data = lambda *_, **__: tokens
        function = {"dynamic_quant": "estimate_sensitivities", "gptq": "gptq_quantize"}[name]
        setattr(command, function, in_float32(getattr(command, function)))
    sys.argv = [f"mlx_lm.{name}", *arguments]
    command.main()


if __name__ == "__main__":
    main()
