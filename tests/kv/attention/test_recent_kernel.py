"""The kernels of a decoding step, which see the last tokens as they were computed."""

import mlx.core as mx
import numpy as np
import pytest
from kernel_shim import kernel_factory

from mlx_optiq_ext.kernels import Platform
from mlx_optiq_ext.kv.attention import blocks, kernels
from mlx_optiq_ext.kv.kept.recent import Recent

from .test_kernels import BLOCKS, CASES, problem

pytestmark = pytest.mark.newest
COUNT = 4


@pytest.fixture(params=["cuda", "metal"])
def gpu(request, tmp_path) -> Platform:
    return Platform(request.param, kernel_factory(request.param, tmp_path))


@pytest.mark.parametrize("name", [name for name in CASES if "1, affine" not in name])
def test_kernels_see_the_last_tokens_as_they_were_computed(name, gpu):
    check(name, gpu)


@pytest.mark.parametrize("end", [2, 6, 30])
@pytest.mark.parametrize("name", ["4 bits", "3 and 8, left padding"])
def test_in_a_sliding_window(name, end, gpu):
    check(name, gpu, end, 1)


def check(name, gpu, end=None, floor=0):
    queries, keys, values, mask = problem(name)
    length, scale = queries.shape[2], queries.shape[3] ** -0.5
    for side in (keys, values):
        batch, heads, _, dim = side.shape
        exact = mx.random.normal((batch, heads, COUNT + length, dim)).astype(queries.dtype)
        side.recent = Recent(exact, COUNT, end, floor)
    sinks = mx.random.normal((queries.shape[1],))
    assert kernels.supports(queries, keys, values, mask)
    call = (queries, keys, values, scale, mask, sinks)
    found = np.array(kernels.attend(gpu, *call, dtype=mx.float32, blocks=BLOCKS))
    wanted = np.array(blocks.attend(queries.astype(mx.float32), *call[1:]))
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 2e-3
