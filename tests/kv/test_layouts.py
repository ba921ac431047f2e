"""How a packed cache lays out the parts of its formats."""

import mlx.core as mx
import pytest
from mlx_lm.models import cache as stock

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.kv import PackedKVCache, Platform
from mlx_optiq_ext.kv.formats import Affine

from .conftest import saved
from .test_cache import DIM, EQUAL, HEADS, KEYS, LAYOUTS, TURBO, VALUES, packed_cache


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("dim", [64, 96])
def test_interleaved_rows_hold_the_very_same(dim, dtype):
    rows = mx.random.normal((2, HEADS, 5, dim)).astype(dtype)
    for formats in ((Affine(4, 32), Affine(5, 32)), (Affine(8, 32), None)):
        one, other = (
            packed_cache(stock.KVCache(), formats, dense=True, interleaved=interleaved)
            for interleaved in (True, False)
        )
        assert (len(one.planes), len(other.planes)) == (1, 3)
        found, expected = (cache.update_and_fetch(rows, rows) for cache in (one, other))
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == dtype
            assert mx.array_equal(a, b)
        assert one.nbytes == other.nbytes


def test_only_what_looks_alike_is_stacked():
    gpu = LAYOUTS["stacked"]
    for formats in ((KEYS, VALUES), (KEYS, None), TURBO, (KEYS, Affine(4, 64))):
        assert packed_cache(stock.KVCache(), formats, **gpu).layout == "apart"
    without = {"stacked": True, "platform": Platform("cuda")}
    assert packed_cache(stock.KVCache(), EQUAL, **without).layout == "apart"


def test_a_saved_stack_that_lacks_heads_is_refused():
    cache = packed_cache(stock.KVCache(), EQUAL, **LAYOUTS["stacked"])
    rows = mx.random.normal((1, HEADS, 3, DIM))
    cache.update_and_fetch(rows, rows)
    plane = cache.planes[0]
    plane.values = plane.values[:, 1:]
    with pytest.raises(InputError, match="lacks the heads of its values"):
        PackedKVCache.from_state(*saved(cache))
