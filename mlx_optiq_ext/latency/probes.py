"""The kernels that calibration times: products, attention, a layer's small kernels, whole steps.

Each probe returns a function that queues some repeats of its work and returns what to evaluate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..model.headers import Header
from .layout import Layout, layout_of

#: Queues so many repeats of some work; what it returns is evaluated.
Probe = Callable[[int], Any]
GROUP = 64


@dataclass(frozen=True)
class Sizes:
    """How large the probes are.

    Attributes:
        rows: Of a product's weights.
        packed_rows: The same where they are quantized.
        columns: Of a product's weights.
        read_bytes: Of weights and of caches that one-row probes go through: beyond any cache.
        prompt: Rows of a prompt's products, its norms and its attention.
        packed_prompt: Rows of a prompt's products with quantized weights.
        heads: Query heads of attention; there is a key and value head for every second one.
        head: Elements of a head.
        context: Positions of a cache.
        hidden: Width of the small model's layers.
        layers: Of the small model.
        steps: Tokens that the small model generates at a time.
    """

    rows: int
    packed_rows: int
    columns: int
    read_bytes: int
    prompt: int
    packed_prompt: int
    heads: int
    head: int
    context: int
    hidden: int
    layers: int
    steps: int


#: Large enough for a fast GPU to outlast its launches.
GPU = Sizes(16384, 16384, 4096, 1 << 30, 2048, 2048, 16, 128, 32768, 256, 24, 48)
#: A CPU unpacks weights one by one, and half precision slower still.
CPU = Sizes(1024, 256, 1024, 1 << 26, 64, 4, 8, 64, 512, 64, 16, 18)


def weights(sizes: Sizes, dtype: mx.Dtype, bits: int | None) -> list[tuple[mx.array, ...]]:
    """Random weights that take ``read_bytes`` before they are quantized to ``bits``, if at all."""
    rows = sizes.rows if bits is None else sizes.packed_rows
    count = max(1, sizes.read_bytes // (sizes.rows * sizes.columns * dtype.size))
    found = []
    for _ in range(count):
        weight = (mx.random.normal((rows, sizes.columns)) * sizes.columns**-0.5).astype(dtype)
        parts = (weight,) if bits is None else mx.quantize(weight, group_size=GROUP, bits=bits)
        mx.eval(parts)
        found.append(tuple(parts))
    return found


def product(rows: mx.array, parts: tuple[mx.array, ...], bits: int | None) -> mx.array:
    """Rows times one of `weights`, as ``nn.Linear`` and ``nn.QuantizedLinear`` compute it."""
    if bits is None:
        return rows @ parts[0].T
    weight, scales, biases = parts
    return mx.quantized_matmul(rows, weight, scales, biases, group_size=GROUP, bits=bits)


def products(
    choices: list[tuple[mx.array, ...]], rows: int, columns: int, dtype: mx.Dtype, bits: int | None
) -> Probe:
    """Products of so many rows with one weight after the other."""
    vector = mx.random.normal((rows, columns)).astype(dtype)
    mx.eval(vector)
    return lambda count: [product(vector, choices[n % len(choices)], bits) for n in range(count)]


def cache_reads(sizes: Sizes, dtype: mx.Dtype) -> tuple[Probe, int]:
    """One token's attention over caches, and the bytes of one."""
    shape = (1, sizes.heads // 2, sizes.context, sizes.head)
    query = mx.random.normal((1, sizes.heads, 1, sizes.head)).astype(dtype)
    nbytes = 2 * mx.zeros(shape, dtype).nbytes
    count = max(1, sizes.read_bytes // 4 // nbytes)
    caches = [(_normal(shape, dtype), _normal(shape, dtype)) for _ in range(count)]
    mx.eval(query, caches)
    scale = sizes.head**-0.5

    def run(repeats: int) -> list[mx.array]:
        chosen = (caches[n % count] for n in range(repeats))
        attend = mx.fast.scaled_dot_product_attention
        return [attend(query, keys, values, scale=scale) for keys, values in chosen]

    return run, nbytes


def prompt_attention(sizes: Sizes, dtype: mx.Dtype) -> tuple[Probe, float]:
    """A prompt's causal attention, and its FLOP as the roofline counts them."""
    rows, heads, head = sizes.prompt, sizes.heads, sizes.head
    query = _normal((1, heads, rows, head), dtype)
    keys, values = (_normal((1, heads // 2, rows, head), dtype) for _ in range(2))
    mx.eval(query, keys, values)

    def run(repeats: int) -> list[mx.array]:
        attend = mx.fast.scaled_dot_product_attention
        return [
            attend(query, keys, values, scale=head**-0.5, mask="causal") for _ in range(repeats)
        ]

    return run, 4.0 * heads * head * rows * rows / 2


def small_kernels(sizes: Sizes, dtype: mx.Dtype) -> tuple[Probe, int]:
    """What a decoder layer does to a prompt beside products and attention.

    Returns:
        The probe, and the elements that the layer's products would have yielded.
    """
    rows, heads, head = sizes.prompt, sizes.heads, sizes.head
    hidden, inner = heads * head, 3 * heads * head
    start, norm = _normal((1, rows, hidden), dtype), mx.ones((hidden,), dtype)
    keys = _normal((1, rows, heads // 2 * head), dtype)
    gate, up = (_normal((1, rows, inner), dtype) for _ in range(2))
    mx.eval(start, norm, keys, gate, up)

    def rotated(value: mx.array) -> mx.array:
        split = value.reshape(1, rows, -1, head).transpose(0, 2, 1, 3)
        return mx.fast.rope(split, head, traditional=False, base=1e4, scale=1.0, offset=0)

    def run(repeats: int) -> list[mx.array]:
        found, value = [], start
        for _ in range(repeats):
            normed = mx.fast.rms_norm(value, norm, 1e-6)
            query = rotated(normed).transpose(0, 2, 1, 3).reshape(1, rows, hidden)
            value = value + query
            normed = mx.fast.rms_norm(value, norm, 1e-6)
            found += [rotated(keys), nn.silu(gate) * up]
            value = value + normed
        return [*found, value]

    # Queries, keys, values, two outputs, gate and up.
    return run, rows * (3 * hidden + 2 * (heads // 2 * head) + 2 * inner)


def small_model(sizes: Sizes, dtype: mx.Dtype) -> tuple[nn.Module, Layout]:
    """A model whose steps are all launches, as mlx-lm runs it."""
    from mlx_lm.models import llama

    hidden = sizes.hidden
    config: dict[str, Any] = {
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": sizes.layers,
        "intermediate_size": 2 * hidden, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    }  # fmt: skip
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    arrays: Any = tree_flatten(model.parameters())
    headers = {path: Header(str(a.dtype), tuple(a.shape), a.nbytes) for path, a in arrays}
    return model, layout_of(config, headers)


def generation(model: nn.Module, steps: int) -> Callable[[], None]:
    """So many tokens of mlx-lm's own generation, one step ahead of what is read."""
    from mlx_lm.generate import generate_step

    def run() -> None:
        for _ in generate_step(mx.array([1, 2, 3]), model, max_tokens=steps):
            pass

    return run


def between(
    model: Any, sizes: Sizes, dtype: mx.Dtype, choices: list[tuple[mx.array, ...]], large: int
) -> Callable[[bool], Any]:
    """Large products with a decoder layer after every few of them, or without those layers.

    Args:
        model: From `small_model`.
        sizes: Of the probes.
        dtype: Of the activations.
        choices: From `weights`, unquantized.
        large: Products before each layer.
    """
    state = _normal((1, 1, sizes.hidden), dtype)
    vector = _normal((1, sizes.columns), dtype)
    mx.eval(state, vector)

    def run(with_layers: bool) -> Any:
        hidden, row, turn = state, vector, 0
        for layer in model.layers:
            for _ in range(large):
                row = product(row, choices[turn % len(choices)], None)[:, : sizes.columns]
                turn += 1
            if with_layers:
                # Each waits for the other, as in a model.
                hidden = layer(hidden + row[:, : sizes.hidden], None, None)
                row = row + hidden[0, :, :1]
        return hidden, row

    return run


def _normal(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.random.normal(shape).astype(dtype)
