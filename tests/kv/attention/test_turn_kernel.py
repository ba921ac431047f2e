"""The kernel that undoes on queries what was done to keys, and the rotation of outputs."""

from typing import Any

import mlx.core as mx
import pytest
from kernel_shim import kernel_factory

from mlx_optiq_ext.kernels import Platform
from mlx_optiq_ext.kv import Packed, attend
from mlx_optiq_ext.kv.attention import kernels
from mlx_optiq_ext.kv.formats import Affine

from .test_pack_kernel import transformed

pytestmark = pytest.mark.newest


@pytest.fixture(params=["cuda", "metal"])
def gpu(request, tmp_path) -> Platform:
    return Platform(request.param, kernel_factory(request.param, tmp_path))


def random(*shape: int) -> mx.array:
    mx.random.seed(5)
    return mx.random.normal(shape).astype(mx.bfloat16)


@pytest.mark.parametrize("length", [1, 3])
def test_queries_become_what_the_format_makes_of_them(length, gpu):
    format, queries = transformed(2, 64), random(2, length, 6, 64).swapaxes(1, 2)
    found, expected = (each.astype(mx.float32) for each in both(gpu, queries, format))
    assert found.shape == expected.shape
    assert mx.allclose(found, expected, rtol=1e-2, atol=1e-3)


def both(gpu: Platform, queries: mx.array, format: Affine) -> tuple[mx.array, mx.array]:
    return kernels.turned(gpu, queries, format), format.turn_queries(queries)


def test_what_it_cannot_turn_is_left_to_the_format(gpu):
    format = transformed(2, 64)
    for queries in (random(1, 4, 9, 64), random(1, 4, 1, 64).astype(mx.float32)):
        assert mx.array_equal(*both(gpu, queries, format))
    plain = Affine(8, 32)
    queries = random(1, 4, 1, 64)
    assert kernels.turned(gpu, queries, plain) is queries


@pytest.mark.parametrize("values", [Affine(8, 32), Affine(8, 32, rotated=True)])
def test_attention_sees_keys_and_values_as_they_were(values, gpu):
    keys, array, queries = random(1, 2, 40, 64), random(1, 2, 40, 64), random(1, 4, 1, 64)
    packed: Any = Packed(transformed(2, 64).pack(keys), transformed(2, 64))
    found = attend(queries, packed, Packed(values.pack(array), values), scale=0.125, platform=gpu)
    expected = mx.fast.scaled_dot_product_attention(queries, keys, array, scale=0.125)
    assert mx.allclose(found.astype(mx.float32), expected.astype(mx.float32), atol=0.02)
