"""The decoding kernels' own source, run on the CPU, beside plain attention."""

from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from kernel_shim import kernel_factory

from mlx_optiq_ext.kernels import Platform, platform
from mlx_optiq_ext.kv import Packed, attend
from mlx_optiq_ext.kv.attention import dispatch, fused, kernels
from mlx_optiq_ext.kv.formats import Affine, TurboQuant
from mlx_optiq_ext.kv.packed_array import Stack

pytestmark = pytest.mark.newest

#: Every width, group size, head dimension and mask; for each a kernel is compiled, so that a case
#: takes several: (keys, values, (key dim, value dim), repeats, length, tokens, mask).
CASES = {
    "4 bits": (Affine(4, 64), Affine(4, 64), (128, 128), 4, 1, 333, "none"),
    "8 and 3": (Affine(8, 32), Affine(3, 64), (64, 64), 2, 2, 101, "causal"),
    "3 and 8, left padding": (Affine(3, 128), Affine(8, 128), (128, 128), 1, 1, 70, "padding"),
    "5 and 6, a window": (Affine(5, 32), Affine(6, 32), (96, 96), 3, 3, 97, "window"),
    "6 and 2, two widths": (Affine(6, 64), Affine(2, 32), (256, 64), 5, 1, 45, "none"),
    "2 and 5, many rows": (Affine(2, 32), Affine(5, 64), (64, 256), 9, 8, 40, "added"),
    "8 bits, padding": (Affine(8, 32), Affine(8, 32), (64, 64), 2, 2, 50, "padding"),
    "TurboQuant 4": (TurboQuant(4), TurboQuant(4), (128, 128), 4, 1, 130, "causal"),
    "TurboQuant 3 and 2": (TurboQuant(3), TurboQuant(2), (96, 96), 2, 1, 50, "none"),
    "TurboQuant 1, affine 4": (TurboQuant(1), Affine(4, 32), (64, 64), 2, 4, 16, "causal"),
}
BATCH, HEADS = 2, 2


def mask_of(kind: str, length: int, tokens: int, query_heads: int):
    rows, columns = mx.arange(tokens - length, tokens)[:, None], mx.arange(tokens)[None]
    if kind == "padding":
        return columns[None, None] >= mx.array([0, tokens // 3])[:, None, None, None]
    if kind == "window":
        return mx.logical_and(columns <= rows, columns > rows - 37)
    if kind == "added":
        return mx.random.normal((query_heads, length, tokens))
    return None if kind == "none" else kind


def problem(name: str, dtype: mx.Dtype = mx.bfloat16) -> Any:
    keys, values, dims, repeats, length, tokens, mask = CASES[name]
    mx.random.seed(11)
    queries = mx.random.normal((BATCH, HEADS * repeats, length, dims[0])).astype(dtype)
    packed = []
    for format, dim in ((keys, dims[0]), (values, dims[1])):
        # Keys that have a mean of their own, as real ones do.
        array = (mx.random.normal((BATCH, HEADS, tokens, dim)) + 0.5).astype(dtype)
        fitted = format.fitted(dim)
        packed.append(Packed(fitted.pack(array), fitted))
    return queries, *packed, mask_of(mask, length, tokens, queries.shape[1])


def expected(queries, keys, values, mask, sinks) -> np.ndarray:
    """In float64, over the stored basis."""
    q, k, v = (
        np.array(a.astype(mx.float32)).astype(np.float64)
        for a in (queries, keys.stored(mx.float32), values.stored(mx.float32))
    )
    repeats, (length, tokens) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = k.repeat(repeats, 1), v.repeat(repeats, 1)
    scores = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
    if isinstance(mask, str):
        mask = mx.arange(tokens)[None] <= mx.arange(tokens - length, tokens)[:, None]
    if mask is not None:
        rows = np.array(mask)
        scores = np.where(rows, scores, -1e300) if rows.dtype == bool else scores + rows
    weights = np.exp(scores)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(np.array(sinks, np.float64))[None, :, None, None]
    return weights / total @ v


#: Several splits, and few threads to run one by one.
BLOCKS = 24


@pytest.fixture(params=["cuda", "metal"])
def gpu(request, tmp_path) -> Platform:
    return Platform(request.param, kernel_factory(request.param, tmp_path))


@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_attention_in_float64(name, gpu):
    queries, keys, values, mask = problem(name)
    sinks = mx.random.normal((queries.shape[1],)) if mask is not None else None
    assert kernels.supports(queries, keys, values, mask)
    scale = queries.shape[-1] ** -0.5
    exact = partial(kernels.attend, gpu, dtype=mx.float32, blocks=BLOCKS)
    found = np.array(exact(queries, keys, values, scale, mask, sinks))
    reference = expected(queries, keys, values, mask, sinks)
    error = np.linalg.norm(found - reference) / np.linalg.norm(reference)
    # Products are in half precision on CUDA, in float32 on Metal.
    assert error < (1e-3 if gpu.name == "cuda" else 1e-6)


def test_rows_with_gaps_between_them_are_read_too(gpu, tmp_path):
    call: Any = (*problem("TurboQuant 1, affine 4")[:3], 0.1, "causal", None)
    apart = Platform(gpu.name, kernel_factory(gpu.name, tmp_path, gaps=True))
    straight, found = (kernels.attend(each, *call, blocks=BLOCKS) for each in (gpu, apart))
    assert mx.array_equal(found, straight)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("name", ["4 bits", "8 bits, padding"])
def test_a_stack_is_read_as_its_parts_are(name, gaps, gpu, tmp_path):
    queries, keys, values, mask = problem(name)
    codes = mx.concatenate([keys.parts[0], values.parts[0]], axis=1)
    words = [mx.concatenate(side.parts[1:], axis=-1).view(mx.uint32) for side in (keys, values)]
    stack = Stack(codes, mx.concatenate(words, axis=1), mx.bfloat16)
    both: Any = [
        Packed.of_stack(stack, side, each.format) for side, each in enumerate((keys, values))
    ]
    assert [each.shape for each in both] == [keys.shape, values.shape]
    other = Platform(gpu.name, kernel_factory(gpu.name, tmp_path, gaps=gaps))
    call: Any = (0.1, mask, None)
    found = kernels.attend(other, queries, both[0], both[1], *call, blocks=BLOCKS)
    straight = kernels.attend(gpu, queries, keys, values, *call, blocks=BLOCKS)
    assert mx.array_equal(found, straight)


def test_a_row_that_may_look_nowhere_is_finite(gpu):
    queries, keys, values, _ = problem("TurboQuant 1, affine 4")
    mask = mx.zeros((1, 1, queries.shape[2], keys.shape[2]), mx.bool_)
    found = kernels.attend(gpu, queries, keys, values, 0.1, mask, None, blocks=BLOCKS)
    assert bool(mx.isfinite(found.astype(mx.float32)).all())


def is_ours(found: Any) -> bool:
    return getattr(found, "func", None) is kernels.attend


def test_the_kernel_is_chosen_where_it_can_compute_the_call():
    queries, keys, values, mask = problem("4 bits")
    with_kernels = Platform("cuda", kernel_factory("cuda", Path()))
    assert is_ours(dispatch.choose(with_kernels, queries, keys, values, mask))
    for other in ("cuda", "metal", "cpu"):
        assert not is_ours(dispatch.choose(Platform(other), queries, keys, values, mask))
    for call in (
        (mx.repeat(queries, 9, axis=2), keys, values, mask),  # a prompt
        (queries.astype(mx.float32), keys, values, mask),
        (queries, keys, values.plain(), mask),
        (queries, keys[:, :, :15], values[:, :, :15], mask),
    ):
        assert not is_ours(dispatch.choose(with_kernels, *call))
    assert dispatch.choose(Platform("cuda"), queries, keys, values, mask) is fused.attend


@pytest.mark.parametrize(("capability", "ours"), [(7, False), (8, True), (9, True)])
def test_older_gpus_and_older_mlx_do_without(capability, ours, monkeypatch):
    described = {"compute_capability_major": capability}
    monkeypatch.setattr(mx, "device_info", lambda: described, raising=False)
    assert (platform.detected("cuda").compile is not None) is ours
    monkeypatch.delattr(mx.fast, "cuda_kernel")
    assert platform.detected("cuda").compile is None


def test_attention_rotates_around_the_kernel(tmp_path):
    gpu = Platform("cuda", kernel_factory("cuda", tmp_path))
    queries, keys, values, _ = problem("TurboQuant 1, affine 4")
    found = attend(queries, keys, values, scale=0.125, mask="causal", platform=gpu)
    reference = mx.fast.scaled_dot_product_attention(
        queries.astype(mx.float32), keys.plain(mx.float32), values.plain(mx.float32),
        scale=0.125, mask="causal",
    )  # fmt: skip
    assert mx.allclose(found.astype(mx.float32), reference, atol=0.02)
