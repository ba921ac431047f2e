"""Initializes an adapter with the quantization residual.

LoftQ (Li et al., 2023, arXiv:2310.08659) starts adapters from the top singular directions of
W - W_q. Which directions matter depends on the layer's inputs: the best update of a rank is the
projection of W - W_q on the top left singular vectors of (W - W_q) X (QERA, Zhang et al., 2024,
arXiv:2410.06040). They are found from a random sketch of the inputs X (Halko, Martinsson, Tropp,
2011, arXiv:0909.4061), which is as small as the adapter.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..errors import InputError
from ..model.config import place
from ..model.taps import Use, tapped
from ..model.vocabulary import check_tokens
from .geometry import EMBEDDING, EXPERTS, geometry
from .layers import base_of

#: Columns of a sketch for each unit of rank, and extra columns.
WIDTH, MORE = 4, 32


def start_from_residual(
    model: nn.Module,
    layers: Mapping[str, Any],
    original: nn.Module,
    samples: Sequence[Sequence[int]],
) -> int:
    """Initialize every adapter on a quantized layer with its quantization residual.

    Args:
        model: The quantized model.
        layers: Path -> its LoRA or DoRA layer; changed.
        original: The model before quantization; its weights are released one by one.
        samples: Tokens of texts to weight the directions by, such as those to train on.

    Returns:
        Number of layers that were initialized. An unquantized layer has no residual and keeps
        mlx-lm's initialization.

    Raises:
        InputError: No layer is quantized, or the original is another model.
    """
    modules: dict[str, Any] = dict(original.named_modules())
    known = {path for path, module in modules.items() if "weight" in module}
    quantized = {path: layer for path, layer in layers.items() if "scales" in base_of(layer)}
    if not quantized:
        raise InputError(
            "--optiq-init residual repairs quantization, but no adapted layer of this model is "
            "quantized: leave it out"
        )
    sources = {}
    for path, layer in quantized.items():
        source = place(path, known)
        shape = geometry(base_of(layer))
        if source is None or "scales" in modules[source] or not _same(shape, modules[source]):
            raise InputError(
                f"--optiq-original has no unquantized {path} of the same shape: name the model "
                "that this one was quantized from"
            )
        sources[path] = source
    seen = _sketches(model, quantized, samples)
    for path, layer in quantized.items():
        source = modules[sources[path]]
        _start(layer, source["weight"].astype(mx.float32), seen.get(path))
        source.weight = mx.zeros(0)
    return len(quantized)


def _same(shape: Any, module: Any) -> bool:
    other = geometry(module)
    parts = ("kind", "inputs", "outputs", "experts")
    return other is not None and all(getattr(shape, p) == getattr(other, p) for p in parts)


def _sketches(
    model: nn.Module, layers: Mapping[str, Any], samples: Sequence[Sequence[int]]
) -> dict[str, mx.array]:
    """Path -> inputs times noise, (in, width). Embeddings have none, experts share one."""
    bases = {path: base_of(layer) for path, layer in layers.items()}
    ranks = {path: min(layer.lora_a.shape[1:]) for path, layer in layers.items()}
    keys = iter(mx.random.split(mx.random.key(0), max(1, len(samples))))
    found: dict[str, mx.array] = {}
    key = [next(keys)]

    def see(use: Use) -> mx.array:
        if not use.lookup:
            rows = use.inputs.astype(mx.float32).reshape(-1, use.inputs.shape[-1])
            width = WIDTH * ranks[use.path] + MORE
            part = rows.T @ mx.random.normal((len(rows), width), key=key[0])
            before = found.get(use.path)
            found[use.path] = part if before is None else before + part
        return use.outputs

    # DoRA does not call the layer that it sits on.
    model.update_modules(tree_unflatten(list(bases.items())))
    try:
        with tapped(bases, see):
            for tokens in samples:
                check_tokens(model, tokens)
                mx.eval(model(mx.array([list(tokens)])), found)
                key[0] = next(keys, key[0])
    finally:
        model.update_modules(tree_unflatten(list(layers.items())))
    return found


def _start(layer: Any, weight: mx.array, sketch: mx.array | None) -> None:
    base = base_of(layer)
    shape = geometry(base)
    assert shape is not None
    stored = dequantized(base)
    residual = weight - stored
    if shape.kind == EMBEDDING:
        sketch = None
    rank = layer.lora_a.shape[1 if shape.kind == EXPERTS else -1]
    first, second = top_factors(residual, rank, sketch)
    half = layer.scale**-0.5
    first, second = first * half, second * half
    if shape.kind == EXPERTS:
        layer.lora_a, layer.lora_b = second, first
    elif shape.kind == EMBEDDING:
        layer.lora_a, layer.lora_b = first, second
    else:
        layer.lora_a, layer.lora_b = second.T, first.T
    if "m" in layer:
        # DoRA's length of each row is that of the repaired weight.
        layer.m = mx.linalg.norm(stored + layer.scale * first @ second, axis=1)
    mx.eval(layer.trainable_parameters())


def dequantized(base: Any) -> mx.array:
    """The weight that a quantized layer computes with, in float32."""
    weight = mx.dequantize(
        base.weight,
        base.scales,
        base.get("biases"),
        group_size=base.group_size,
        bits=base.bits,
        mode=getattr(base, "mode", "affine"),
    )
    return weight.astype(mx.float32)


def top_factors(
    matrix: mx.array, rank: int, sketch: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """The best approximation of a rank, as two factors whose components have equal norms.

    Args:
        matrix: (..., out, in).
        rank: At most min(out, in) counts; the rest is zero.
        sketch: (in, width), inputs times noise, to weight the error by; None for the plain
            Frobenius norm.

    Returns:
        (..., out, rank) and (..., rank, in), whose product it is.
    """
    seen = matrix if sketch is None else matrix @ sketch
    left = mx.linalg.svd(seen, stream=mx.cpu)[0] if sketch is not None else _range(matrix, rank)
    first = left[..., : min(rank, *matrix.shape[-2:])]
    second = first.swapaxes(-1, -2) @ matrix
    length = mx.linalg.norm(second, axis=-1, keepdims=True)
    root = mx.sqrt(mx.maximum(length, 1e-20))
    second, first = second / root, first * root.swapaxes(-1, -2)
    missing = rank - first.shape[-1]
    lead = [(0, 0)] * (matrix.ndim - 2)
    return (
        mx.pad(first, [*lead, (0, 0), (0, missing)]),
        mx.pad(second, [*lead, (0, missing), (0, 0)]),
    )


def _range(matrix: mx.array, rank: int) -> mx.array:
    """Top left singular vectors, (..., out, rank or more), by subspace iteration."""
    rows, columns = matrix.shape[-2:]
    wide = min(WIDTH * rank + MORE, rows, columns)
    start = mx.random.normal((*matrix.shape[:-2], columns, wide), key=mx.random.key(0))
    basis = _orthonormal(matrix @ start)
    for _ in range(2):
        basis = _orthonormal(matrix @ _orthonormal(matrix.swapaxes(-1, -2) @ basis))
    turned = mx.linalg.svd(basis.swapaxes(-1, -2) @ matrix, stream=mx.cpu)[0]
    return basis @ turned


def _orthonormal(matrix: mx.array) -> mx.array:
    return mx.linalg.qr(matrix, stream=mx.cpu)[0]
