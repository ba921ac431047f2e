"""The last keys and values, which attention sees as they were computed."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from mlx_optiq_ext.kernels import CPU
from mlx_optiq_ext.kv import attend
from mlx_optiq_ext.kv.attention import blocks, composed, fused
from mlx_optiq_ext.kv.cache import PackedKVCache
from mlx_optiq_ext.kv.formats import Affine
from mlx_optiq_ext.kv.plan import LayerFormat

pytestmark = pytest.mark.newest

COUNT, HEADS, DIM = 4, 2, 32
FORMATS = LayerFormat(Affine(2, 32), Affine(2, 32), recent_tokens=COUNT)


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def expected(queries, keys, values, packed) -> np.ndarray:
    """Attention in which a query sees its own token and the three before it exactly."""
    tokens, length = keys.shape[2], queries.shape[2]
    stored = [np.array(each) for each in packed]
    exact = [np.array(keys), np.array(values)]
    found = np.zeros((1, queries.shape[1], length, DIM))
    for head in range(queries.shape[1]):
        own = head // (queries.shape[1] // HEADS)
        for n in range(length):
            at = tokens - length + n
            near = np.arange(at + 1) > at - COUNT
            k, v = (
                np.where(near[:, None], e[0, own, : at + 1], s[0, own, : at + 1])
                for e, s in zip(exact, stored, strict=True)
            )
            scores = k @ np.array(queries)[0, head, n] * DIM**-0.5
            weights = np.exp(scores - scores.max())
            found[0, head, n] = weights / weights.sum() @ v
    return found


@pytest.mark.parametrize("backend", [blocks.attend, composed.attend, fused.attend])
@pytest.mark.parametrize("steps", [(1, 1, 1), (7,), (2, 9, 1, 3), (40, 1, 1)])
def test_queries_see_what_is_near_as_it_was_computed(steps, backend):
    cache = PackedKVCache(KVCache(), FORMATS, platform=CPU)
    tokens = sum(steps)
    keys, values = random(1, HEADS, tokens, DIM), random(1, HEADS, tokens, DIM, seed=1)
    start = 0
    for step in steps:
        stop = start + step
        packed = cache.update_and_fetch(keys[:, :, start:stop], values[:, :, start:stop])
        queries = random(1, 2 * HEADS, step, DIM, seed=stop)
        mask = "causal" if step > 1 else None
        found = attend(
            queries, *packed, scale=DIM**-0.5, mask=mask, backends=[lambda *call: backend(*call)]
        )
        plain = [each.plain() for each in packed]
        wanted = expected(queries, keys[:, :, :stop], values[:, :, :stop], plain)
        assert np.allclose(np.array(found), wanted, atol=2e-5)
        start = stop
