"""Quantize a model by ggml's own encoders, and write what its K- and I-quants stand for.

    python ggml.py LIBRARY MODEL WINDOWS.npz OUT RECIPE[/EMBEDDING][+] [--matrix FILE.npz]

LIBRARY is ``libggml-base.so``: ``pip install llama-cpp-python`` puts it into ``llama_cpp/lib``, or
build the target ``ggml-base`` of the llama.cpp in its source distribution. RECIPE is llama.cpp's
mixture (see recipes.py), EMBEDDING the type of a tied embedding, and ``+`` weights the embedding's
columns too.

Columns are weighted by an importance matrix: the mean square of each input over the first 32,768
calibration tokens, in windows of 512; for the embedding, that of the head's inputs. Rows whose
length is no multiple of a type's block are joined until it is one, where llama.cpp would take a
larger type. OUT holds the decoded weights in float32, and ``stored.json`` the bytes of the
quantized ones with everything else in float32, as GGUF files have it.
"""

import argparse
import ctypes
import json
import math
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

sys.path.append(str(Path(__file__).parents[1]))

from rivals.recipes import kind, parsed

#: The numbers of ggml's types.
TYPES = {
    **{"Q4_0": 2, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14},
    **{"IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ4_NL": 20, "IQ3_S": 21, "IQ2_S": 22},
    "IQ4_XS": 23,
}

TOKENS, WINDOW = 32768, 512

Decode = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class Traits(ctypes.Structure):
    """ggml's description of a type."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("decode", Decode),
        ("encode", ctypes.c_void_p),
    )


def open_library(path: Path) -> Any:
    """Load ggml and say what its functions take."""
    library = ctypes.CDLL(str(path))
    library.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    chunk = library.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    return library


def coded(
    library: Any, weight: np.ndarray, name: str, importance: np.ndarray | None
) -> tuple[np.ndarray, int]:
    """A weight as a type can say it, and the bytes that it takes.

    Args:
        library: From `open_library`.
        weight: (rows, columns), float32.
        name: One of ``TYPES``.
        importance: (columns,), float32; None weights all alike.
    """
    traits = library.ggml_get_type_traits(TYPES[name]).contents
    rows, columns = weight.shape
    joined = traits.block // math.gcd(traits.block, columns)
    if rows % joined:
        raise SystemExit(f"{rows} rows of {columns} do not fill blocks of {traits.block}")
    source = np.ascontiguousarray(weight, np.float32)
    packed = np.empty(weight.size // traits.block * traits.size, np.uint8)
    found = np.empty_like(source)
    columns_of = None
    if importance is not None:
        columns_of = np.ascontiguousarray(np.tile(importance, joined), np.float32)
    library.ggml_quantize_chunk(
        *(TYPES[name], source.ctypes.data, packed.ctypes.data, 0),
        *(rows // joined, columns * joined),
        None if columns_of is None else columns_of.ctypes.data,
    )
    traits.decode(packed.ctypes.data, found.ctypes.data, found.size)
    return found, packed.nbytes


class Recorder(nn.Module):
    """A layer that adds up the squares of its inputs."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.sums = mx.zeros(())

    def __call__(self, x: mx.array) -> mx.array:
        self.sums = self.sums + x.astype(mx.float32).square().sum(axis=tuple(range(x.ndim - 1)))
        return self.inner(x)


def importance_matrix(model: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Mean square of each layer's inputs, and of the head's under ``head``.

    Args:
        model: A model of mlx-lm; its layers are put back afterwards.
        tokens: (count,), calibration tokens.
    """
    linear = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    recorders = {path: Recorder(module) for path, module in linear.items()}
    model.update_modules(tree_unflatten(list(recorders.items())))
    windows = tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)
    head = mx.zeros(())
    for start in range(0, len(windows), 8):
        hidden = model.model(mx.array(windows[start : start + 8])).astype(mx.float32)
        head = head + hidden.square().sum(axis=(0, 1))
        mx.eval(head, *(recorder.sums for recorder in recorders.values()))
    model.update_modules(tree_unflatten(list(linear.items())))
    sums = {path: recorder.sums for path, recorder in recorders.items()} | {"head": head}
    # A head of its own was not called.
    return {path: np.array(s) / windows.size for path, s in sums.items() if s.ndim}


def matrix(args: argparse.Namespace, model: Any) -> dict[str, np.ndarray]:
    """The importance matrix, from a file where an earlier run has kept it with its time."""
    if args.matrix and args.matrix.exists():
        return dict(np.load(args.matrix))
    started, busy = time.perf_counter(), time.process_time()
    found = importance_matrix(model, np.load(args.windows)["text"][:TOKENS])
    spent = {
        "seconds": time.perf_counter() - started,
        "processor": time.process_time() - busy,
    }
    if args.matrix:
        args.matrix.with_suffix(".timing").write_text(json.dumps(spent))
        # Another process may read it at any time.
        written = args.matrix.with_name(f"{os.getpid()}-{args.matrix.name}")
        np.savez(written, **found)  # pyright: ignore[reportArgumentType]
        written.replace(args.matrix)
    return found


def flat(model: Any) -> list[tuple[str, mx.array]]:
    """Names and arrays of all parameters."""
    found: Any = tree_flatten(model.parameters())
    return found


def is_wide(config: dict[str, Any]) -> bool:
    """Whether four query heads or more share a key head."""
    heads = config["num_attention_heads"]
    return heads >= 4 * config.get("num_key_value_heads", heads)


def main() -> None:
    """Quantize, decode and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("recipe")
    parser.add_argument("--matrix", type=Path, help="keeps the importance matrix")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    recipe, embedding, weighted = parsed(args.recipe)
    library = open_library(args.library)
    model: Any = mlx_lm.load(str(args.model))[0]
    config = json.loads((args.model / "config.json").read_text())
    model.update(tree_map(lambda a: a.astype(mx.float32), model.parameters()))
    importance = matrix(args, model)
    # Threads other than this one may not evaluate arrays of MLX.
    parameters = {path: np.array(a) for path, a in flat(model)}
    if "lm_head.weight" in parameters or any(a.ndim > 2 for a in parameters.values()):
        raise SystemExit("only models with a tied embedding and without experts")
    layers, wide = len(model.layers), is_wide(config)

    def one(path: str) -> tuple[np.ndarray, int]:
        module, value = path.removesuffix(".weight"), parameters[path]
        number = re.search(r"\.layers\.(\d+)\.", path)
        if value.ndim != 2:
            return value, value.nbytes
        if number is None:
            at = importance["head"] if weighted else None
            return coded(library, value, embedding, at)
        name = kind(recipe, module, int(number[1]), layers, wide)
        return coded(library, value, name, importance[module])

    for name in TYPES.values():
        library.ggml_quantize_init(name)
    with ThreadPoolExecutor(args.threads) as pool:
        found = dict(zip(parameters, pool.map(one, parameters), strict=True))
    args.out.mkdir(parents=True)
    for file in args.model.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copy(file, args.out)
    decoded = {path: mx.array(value) for path, (value, _) in found.items()}
    mx.save_safetensors(str(args.out / "model.safetensors"), decoded, {"format": "mlx"})
    stored = {
        "bytes": sum(size for _, size in found.values()),
        "parameters": sum(value.size for value, _ in found.values()),
    }
    (args.out / "stored.json").write_text(json.dumps(stored))


if __name__ == "__main__":
    main()
