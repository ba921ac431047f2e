"""What a decoding step of one layer adds to the graph on a GPU: each operation costs host time."""

from typing import Any

import mlx.core as mx
import pytest
from host_time import nodes_of
from kernel_shim import node_factory
from mlx_lm.models.cache import KVCache

from mlx_optiq_ext.kv import LayerFormat, PackedKVCache, Platform, attend
from mlx_optiq_ext.kv.formats import Affine

from .test_pack_kernel import transformed

pytestmark = pytest.mark.newest

HEADS, DIM = 2, 64
#: Keys and values of a plan, launches of kernels of our own for them, and arrays that grow.
PLANS = {
    "8": (Affine(8, 32), Affine(8, 32), 3, 2),
    "4": (transformed(HEADS, DIM), Affine(8, 32, rotated=True), 4, 2),
    "two widths": (Affine(8, 32), Affine(4, 32), 3, 6),
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_step_is_a_few_kernels_and_updates_in_place(plan):
    keys, values, launches, arrays = PLANS[plan]
    sinks = 1 if keys.transformed else 0
    platform = Platform("cuda", node_factory())
    formats = LayerFormat(keys, values, sinks)
    cache: Any = PackedKVCache(KVCache(), formats, stacked=True, platform=platform)
    queries, new = (mx.zeros((1, heads, 1, DIM), mx.bfloat16) for heads in (6, HEADS))
    prompt = mx.zeros((1, HEADS, 40, DIM), mx.bfloat16)
    cache.update_and_fetch(prompt, prompt)
    mx.eval(queries, new, cache.state)
    for _ in range(2):
        output = attend(queries, *cache.update_and_fetch(new, new), scale=0.1)
        nodes = nodes_of(output)
        mx.eval(output, cache.state)
    assert nodes == {"Depends": launches, "SliceUpdate": arrays, "Slice": arrays}
