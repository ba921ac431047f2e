"""The decoding kernels' own source, run on the CPU, beside plain attention."""

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from kernel_shim import kernel_factory

from mlx_optiq_ext.kv import Format, Packed, attention
from mlx_optiq_ext.kv.attention import dispatch, fused, kernels
from mlx_optiq_ext.kv.attention.kernels import launch
from mlx_optiq_ext.turboquant import TurboFormat

pytestmark = pytest.mark.newest

#: Every width, group size, head dimension and mask; for each a kernel is compiled, so that a case
#: takes several: (keys, values, (key dim, value dim), repeats, length, tokens, mask).
CASES = {
    "4 bits": (Format(4, 64), Format(4, 64), (128, 128), 4, 1, 333, "none"),
    "8 and 3": (Format(8, 32), Format(3, 64), (64, 64), 2, 2, 101, "causal"),
    "3 and 8, left padding": (Format(3, 128), Format(8, 128), (128, 128), 1, 1, 70, "padding"),
    "5 and 6, a window": (Format(5, 32), Format(6, 32), (96, 96), 3, 3, 97, "window"),
    "6 and 2, two widths": (Format(6, 64), Format(2, 32), (256, 64), 5, 1, 45, "none"),
    "2 and 5, many rows": (Format(2, 32), Format(5, 64), (64, 256), 9, 8, 40, "added"),
    "TurboQuant 4": (TurboFormat(4), TurboFormat(4), (128, 128), 4, 1, 130, "causal"),
    "TurboQuant 3 and 2": (TurboFormat(3), TurboFormat(2), (96, 96), 2, 1, 50, "none"),
    "TurboQuant 1, affine 4": (TurboFormat(1), Format(4, 32), (64, 64), 2, 4, 16, "causal"),
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


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """A GPU with tensor cores, as MLX from 0.31 on describes it."""
    dispatch._tensor_cores.cache_clear()
    monkeypatch.setattr(mx, "device_info", lambda: {"compute_capability_major": 9}, raising=False)
    yield
    dispatch._tensor_cores.cache_clear()


@pytest.fixture(params=["cuda", "metal"])
def platform(request, monkeypatch, tmp_path):
    name = request.param
    launch._call.cache_clear()
    monkeypatch.setattr(mx.fast, f"{name}_kernel", kernel_factory(name, tmp_path))
    monkeypatch.setattr(launch, "BLOCKS", 24)  # several splits, and few threads to run one by one
    yield name
    launch._call.cache_clear()


@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_attention_in_float64(name, platform):
    queries, keys, values, mask = problem(name)
    sinks = mx.random.normal((queries.shape[1],)) if mask is not None else None
    assert kernels.supports(queries, keys, values, mask)
    scale = queries.shape[-1] ** -0.5
    attend = partial(kernels.attend, platform, dtype=mx.float32)
    found = np.array(attend(queries, keys, values, scale, mask, sinks))
    reference = expected(queries, keys, values, mask, sinks)
    error = np.linalg.norm(found - reference) / np.linalg.norm(reference)
    # Products are in half precision on CUDA, in float32 on Metal.
    assert error < (1e-3 if platform == "cuda" else 1e-6)


def test_rows_with_gaps_between_them_are_read_too(platform, monkeypatch, tmp_path):
    queries, keys, values, mask = problem("TurboQuant 1, affine 4")
    straight = kernels.attend(platform, queries, keys, values, 0.1, mask, None)
    launch._call.cache_clear()
    make = kernel_factory(platform, tmp_path, gaps=True)
    monkeypatch.setattr(mx.fast, f"{platform}_kernel", make)
    assert mx.array_equal(
        kernels.attend(platform, queries, keys, values, 0.1, mask, None), straight
    )


def test_a_row_that_may_look_nowhere_is_finite(platform):
    queries, keys, values, _ = problem("TurboQuant 1, affine 4")
    mask = mx.zeros((1, 1, queries.shape[2], keys.shape[2]), mx.bool_)
    found = kernels.attend(platform, queries, keys, values, 0.1, mask, None)
    assert bool(mx.isfinite(found.astype(mx.float32)).all())


def test_the_kernel_is_chosen_where_it_can_compute_the_call(monkeypatch):
    queries, keys, values, mask = problem("4 bits")

    def chosen(name, *call):
        found: Any = dispatch.choose(name, *call)
        return found.func if isinstance(found, partial) else found

    assert chosen("cuda", queries, keys, values, mask) is kernels.attend
    assert chosen("metal", queries, keys, values, mask) is not kernels.attend
    monkeypatch.setenv("MLX_OPTIQ_EXT_METAL_KERNEL", "1")
    assert chosen("metal", queries, keys, values, mask) is kernels.attend
    assert chosen("cpu", queries, keys, values, mask) is not kernels.attend
    for other in (
        (mx.repeat(queries, 9, axis=2), keys, values, mask),  # a prompt
        (queries.astype(mx.float32), keys, values, mask),
        (queries, keys, values.plain(), mask),
        (queries, keys[:, :, :15], values[:, :, :15], mask),
    ):
        assert chosen("cuda", *other) is not kernels.attend


@pytest.mark.parametrize(("capability", "ours"), [(7, False), (8, True), (9, True)])
def test_older_gpus_and_older_mlx_do_without(capability, ours, monkeypatch):
    call = problem("4 bits")
    monkeypatch.setattr(mx, "device_info", lambda: {"compute_capability_major": capability})
    chosen = dispatch.choose("cuda", *call)
    assert (getattr(chosen, "func", None) is kernels.attend) is ours
    dispatch._tensor_cores.cache_clear()
    monkeypatch.delattr(mx.fast, "cuda_kernel")
    assert dispatch.choose("cuda", *call) is fused.attend


def test_attention_rotates_around_the_kernel(monkeypatch, tmp_path):
    launch._call.cache_clear()
    monkeypatch.setattr(dispatch, "backend", lambda: "cuda")
    monkeypatch.setattr(mx.fast, "cuda_kernel", kernel_factory("cuda", tmp_path))
    queries, keys, values, _ = problem("TurboQuant 1, affine 4")
    found = attention(queries, keys, values, scale=0.125, mask="causal").astype(mx.float32)
    reference = mx.fast.scaled_dot_product_attention(
        queries.astype(mx.float32), keys.plain(mx.float32), values.plain(mx.float32),
        scale=0.125, mask="causal",
    )  # fmt: skip
    assert mx.allclose(found, reference, atol=0.02)
    launch._call.cache_clear()
