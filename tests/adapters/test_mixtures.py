"""Sums of adapters with scales: what they compute, and what they are equal to."""

import math

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest

from mlx_optiq_ext.adapters import (
    AdapterActivation,
    AdapterPromptCache,
    Mixture,
    MountedAdapter,
    activate,
    active,
    adapters_in,
    mixed,
    mount_adapter_on_model,
    prepare_model_for_mounted_lora,
)
from mlx_optiq_ext.adapters.activation import Rows
from mlx_optiq_ext.errors import InputError

from .test_layers import WIDE, Model, made

A, B = (MountedAdapter(name, name, "here", 0) for name in "ab")
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def test_a_sum_is_the_same_in_any_order_and_without_what_has_scale_0():
    assert mixed([(A, 1.0), (B, 0.5)]) == mixed([(B, 0.5), (A, 1.0)])
    assert mixed([(A, 0.5), (B, 0.0)]) == mixed([(A, 0.5)]) != mixed([(A, 0.25)])
    assert mixed([(A, 1.0), (B, 0)]) is A
    assert mixed([(A, 0.25), (A, 0.75)]) is A
    assert mixed([(A, 0.0)]) is mixed([]) is mixed([(A, 1.0), (A, -1.0)]) is None
    assert adapters_in(mixed([(B, 2.0), (A, -1.0)])) == (A, B)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 10.5, 10**400, True, "1", None])
def test_scales_that_are_no_usable_number_are_refused(scale):
    with pytest.raises(InputError, match="scale of an adapter must be a number from -10 to 10"):
        mixed([(A, scale)])
    with pytest.raises(InputError, match="scale of an adapter"):
        AdapterActivation("a", scale=scale)
    with pytest.raises(InputError, match="scale of an adapter"):
        AdapterActivation({"a": scale})


def test_the_scales_of_one_adapter_have_one_limit():
    with pytest.raises(InputError, match="scale of an adapter"):
        mixed([(A, 10.0), (A, 0.5)])
    assert mixed([(A, 10.0), (A, 1.0), (A, -10.0)]) is A


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_is_the_base_plus_each_update_times_its_scale(bits, dtype):
    mx.random.seed(3)
    model = Model()
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    x = (mx.random.normal((3, 5, WIDE)) * 0.5).astype(dtype)
    tokens = mx.random.randint(0, 50, (3, 5))
    chosen = mx.random.randint(0, 6, (3, 5, 2))
    layers = {
        "proj": lambda: model.proj(x),
        "embed": lambda: model.embed(tokens),
        "head": lambda: model.embed.as_linear(x),
        "up": lambda: model.experts.up_proj(x[..., None, None, :], chosen),
    }
    if dtype != mx.float32 and not bits:
        del layers["up"]  # MLX has no such experts on a CPU
    base = {name: call() for name, call in layers.items()}
    _, (a, b, _) = made(model, "abc", (4, 9, 4), dtype)
    updates = {}
    for each in (a, b):
        with AdapterActivation(each):
            for name, call in layers.items():
                updates[each, name] = _wide(call()) - _wide(base[name])
    for scales in ({"a": 1.0, "b": 1.0}, {"a": 0.5, "b": -1.5}, {a: 0.3, "b": 0.0}):
        with AdapterActivation(scales):
            for name, call in layers.items():
                found, expected = call(), _wide(base[name])
                for each, scale in scales.items():
                    adapter = {"a": a, "b": b}.get(each, each)
                    expected = expected + scale * updates[adapter, name]
                assert found.dtype == base[name].dtype
                error = mx.abs(_wide(found) - expected).max() / mx.abs(expected).max()
                allowed = {mx.float32: 1e-5, mx.float16: 4e-3}.get(dtype, 3e-2)
                assert (error < allowed).item(), name
                assert not mx.allclose(found, base[name], atol=1e-2).item()


def _wide(x):
    return x.astype(mx.float32)


@pytest.mark.parametrize("length", [1, 40])  # experts sort many tokens
@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 5, 9)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_different_sums_compute_what_they_do_alone(length, ranks, dtype):
    mx.random.seed(length)
    model = Model()
    nn.quantize(model, group_size=32, bits=4)
    tokens = mx.random.randint(0, 50, (7, length))
    base = model(tokens)
    _, (a, b, c) = made(model, "abc", ranks, dtype)
    both, half = mixed([(a, 1.0), (b, 1.0)]), mixed([(a, 0.5)])
    rows = (None, a, both, b, half, mixed([(a, -0.5), (b, 0.25), (c, 2.0)]), None)
    with AdapterActivation(Rows(rows)):
        together = model(tokens)
    for row, selection in enumerate(rows):
        with AdapterActivation(selection):
            alone = model(tokens[row : row + 1])[0]
        assert mx.allclose(together[row], alone, rtol=1e-3, atol=2e-3).item(), row
        assert mx.array_equal(together[row], base[row]).item() is (selection is None)


def test_a_sum_with_an_unknown_name_is_refused_before_the_block():
    with (
        pytest.raises(InputError, match="no adapter 'nobody'"),
        AdapterActivation({"nobody": 0.5}),
    ):
        pass


def test_an_activation_scales_one_adapter_a_sum_or_nothing():
    for given, scale, expected in [
        ("a", 1.0, "a"),
        ("a", 0.5, Mixture((("a", 0.5),))),
        ({"b": 2.0, "a": 1.0}, 0.5, Mixture((("a", 0.5), ("b", 1.0)))),
        (Mixture((("a", 0.5),)), 2.0, "a"),
        ("a", 0, None),
        (None, 0.5, None),
    ]:
        assert AdapterActivation(given, scale=scale).adapter == expected
    with pytest.raises(InputError, match="scales of their own"):
        AdapterActivation(Rows((A,)), scale=0.5)


def test_a_scale_at_mounting_equals_one_at_activation(model, adapter):
    tokens = mx.arange(5)[None]
    whole = mount_adapter_on_model(model, "whole", adapter("A"))
    half = mount_adapter_on_model(model, "half", adapter("A"), scale=0.5)
    assert half.version != whole.version
    with AdapterActivation("half"):
        mounted = model(tokens)
    with AdapterActivation("whole", scale=0.5):
        activated = model(tokens)
    assert mx.allclose(mounted, activated, atol=1e-5).item()
    with AdapterActivation({"whole": 1.0, half: -2.0}):
        assert mx.allclose(model(tokens), _base(model, tokens), atol=1e-4)
    with pytest.raises(InputError, match="scale of an adapter"):
        mount_adapter_on_model(model, "x", adapter("A"), scale=math.nan)


def _base(model, tokens):
    with AdapterActivation(None):
        return model(tokens)


def test_a_sum_over_two_models_is_refused(exact, adapter):
    first, second = (mlx_lm.load(str(exact))[0] for _ in range(2))
    mount_adapter_on_model(first, "one", adapter("A"))
    mounts = prepare_model_for_mounted_lora(second)
    both = Mixture((("one", 1.0), ("two", 1.0)))
    mount_adapter_on_model(second, "two", adapter("B", seed=1))
    with pytest.raises(InputError, match="'one' is mounted on another model"):
        mounts.resolve(both)
    with AdapterActivation(both), pytest.raises(InputError, match="mounted on another model"):
        second(mx.arange(3)[None])


class Caches(dict):
    """Stands for mlx-lm's cache of prompts."""

    def fetch_nearest_cache(self, model, tokens):
        return self.get((model, tuple(tokens)))

    def insert_cache(self, model, tokens, prompt_cache):
        self[model, tuple(tokens)] = prompt_cache


def test_prompt_caches_are_of_one_set_and_its_scales():
    cache = AdapterPromptCache(Caches(), active)
    same = [mixed([(A, 1.0), (B, 0.5)]), mixed([(B, 0.5), (A, 1.0)])]
    apart = [None, A, B, mixed([(A, 0.5)]), mixed([(A, 1.0), (B, 1.0)]), mixed([(A, 0.5), (B, 1)])]
    newer = mixed([(MountedAdapter("a", "a2", "here", 0), 1.0), (B, 0.5)])
    for number, selection in enumerate([same[0], newer, *apart]):
        before = activate(selection)
        try:
            assert cache.fetch_nearest_cache("model", [1]) is None
            cache.insert_cache("model", [1], [number])
        finally:
            before.var.reset(before)
    with AdapterActivation(same[1]):
        assert cache.fetch_nearest_cache("model", [1]) == [0]
