from functools import partial

import mlx.core as mx
import pytest

from mlx_optiq_ext.kv import Packed, Platform, attend
from mlx_optiq_ext.kv.attention import blocks, composed, dispatch, fused
from mlx_optiq_ext.kv.formats import Affine, Format, TurboQuant

BATCH, HEADS, QUERY_HEADS = 2, 2, 6
SIDES = {
    "one width": (Affine(8, 64), Affine(8, 64)),
    "two widths": (Affine(5, 32), Affine(3, 64)),
    "rotated": (Affine(4, 64, rotated=True), Affine(4, 32, rotated=True)),
    "keys only": (Affine(6, 64), None),
    "values only": (None, Affine(2, 32)),
    "turboquant": (TurboQuant(4, seed=3), TurboQuant(2)),
    "turboquant keys": (TurboQuant(3), Affine(8, 64)),
}
MASKS = {
    "none": lambda rows, tokens: None,
    "causal": lambda rows, tokens: "causal",
    "one for all": lambda rows, tokens: mx.random.uniform(shape=(rows, tokens)) > 0.2,
    "a row": lambda rows, tokens: mx.random.uniform(shape=(BATCH, 1, rows, tokens)) > 0.2,
    "a head, added": lambda rows, tokens: mx.random.normal((BATCH, QUERY_HEADS, rows, tokens)),
}


def problem(rows: int, tokens: int, dim: int = 64, value_dim: int = 64):
    """Queries, keys and values; nothing in them is special."""
    return (
        mx.random.normal((BATCH, QUERY_HEADS, rows, dim)),
        mx.random.normal((BATCH, HEADS, tokens, dim)),
        mx.random.normal((BATCH, HEADS, tokens, value_dim)),
    )


def pack(array: mx.array, format: Format | None):
    if format is None:
        return array
    fitted = format.fitted(array.shape[-1])
    return Packed(fitted.pack(array), fitted)


def plain(array):
    return array.plain() if isinstance(array, Packed) else array


@pytest.fixture(autouse=True)
def seed():
    mx.random.seed(7)


#: Small enough that every loop of the CPU's blocks runs several times.
small_blocks = partial(blocks.attend, block=4, tile=16)
#: Platforms without kernels of our own, and what is asked before the platform's own choice.
PLATFORMS = {"cpu": [small_blocks], "metal": [], "cuda": []}


@pytest.mark.parametrize("name", PLATFORMS)
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize(("rows", "tokens"), [(1, 37), (11, 37)])
def test_every_back_end_agrees_with_plain_attention(rows, tokens, sides, mask, sinks, name):
    queries, keys, values = problem(rows, tokens)
    keys, values = (pack(a, f) for a, f in zip((keys, values), SIDES[sides], strict=True))
    chosen = MASKS[mask](rows, tokens)
    extra = mx.random.normal((QUERY_HEADS,)) if sinks else None
    found = attend(
        queries, keys, values, scale=0.125, mask=chosen, sinks=extra,
        backends=PLATFORMS[name], platform=Platform(name),
    )  # fmt: skip
    expected = mx.fast.scaled_dot_product_attention(
        queries, plain(keys), plain(values), scale=0.125, mask=chosen, sinks=extra
    )
    assert mx.allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("backend", [small_blocks, composed.attend])
def test_values_may_be_wider_than_keys(backend):
    queries, keys, values = problem(2, 21, dim=64, value_dim=96)
    packed = pack(keys, Affine(8, 64)), pack(values, Affine(8, 32))
    found = backend(queries, *packed, 0.125, None, None)
    expected = fused.attend(queries, *packed, 0.125, None, None)
    assert mx.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("sides", SIDES)
def test_of_no_tokens_nothing_is_seen(sides):
    queries, keys, values = problem(2, 37)
    kept, read = (pack(a, f)[:, :, :0] for a, f in zip((keys, values), SIDES[sides], strict=True))
    found = attend(queries, kept, read, scale=0.1)
    assert found.shape == (*queries.shape[:-1], values.shape[-1])
    assert float(mx.abs(found).max()) == 0


def test_the_callers_arrays_stay_as_they_are():
    queries, keys, values = problem(3, 20)
    before = mx.array(queries)
    format = Affine(4, 64, rotated=True)
    for name in ("cpu", "metal", "cuda"):
        packed = pack(keys, format), pack(values, format)
        chosen = dispatch.choose(Platform(name), queries, *packed, "causal")
        mx.eval(chosen(queries, *packed, 0.5, "causal", None))
        assert mx.array_equal(queries, before)


def test_the_result_has_the_queries_type():
    queries, keys, values = (a.astype(mx.bfloat16) for a in problem(3, 20))
    format = Affine(4, 64)
    assert attend(queries, pack(keys, format), pack(values, format), scale=1).dtype == mx.bfloat16


def test_scores_of_a_prompt_are_never_held_at_once():
    queries, keys, values = problem(1024, 2048)
    format = Affine(4, 64)
    keys, values = pack(keys, format), pack(values, format)
    mx.eval(queries, plain(keys), plain(values))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(blocks.attend(queries, keys, values, 1, "causal", None, block=32, tile=256))
    scores = 4 * BATCH * QUERY_HEADS * 1024 * 2048
    assert mx.get_peak_memory() - before < scores / 3


def test_an_unknown_mask_is_named():
    queries, keys, values = problem(2, 4)
    with pytest.raises(ValueError, match="mask 'window' is neither 'causal' nor an array"):
        blocks.attend(queries, keys, values, 1, "window", None)
