"""Attention backends of plugins are asked before our own."""

import mlx.core as mx
import pytest

from mlx_optiq_ext import hookimpl
from mlx_optiq_ext.kv import Packed, attend
from mlx_optiq_ext.kv.formats import Affine
from mlx_optiq_hooks import installation, plugin_manager
from mlx_optiq_hooks.patches.models import base

FORMAT = Affine(8, 64, rotated=True)


@pytest.fixture
def problem():
    arrays = mx.random.normal((3, 1, 2, 5, 64), key=mx.random.key(2))
    return arrays[0], *(Packed(FORMAT.pack(array), FORMAT) for array in arrays[1:])


def test_a_backend_computes_in_the_stored_basis_or_declines(problem):
    asked = []

    def declines(*call):
        asked.append(call)

    def values_of_the_first_token(queries, keys, values, scale, mask, sinks):
        return mx.repeat(values.stored()[:, :, :1], queries.shape[2], axis=2)

    found = attend(*problem, scale=1, backends=(declines, values_of_the_first_token))
    assert mx.allclose(found[:, :, 2], problem[2].plain()[:, :, 0], atol=1e-5)
    assert len(asked) == 1
    ours = attend(*problem, scale=1, backends=(declines,))
    assert mx.allclose(ours, attend(*problem, scale=1))


def test_a_plugin_offers_backends(problem):
    class Plugin:
        @hookimpl
        def optiq_attention_backends(self):
            return [lambda queries, *rest: mx.ones_like(queries)]

    def refuse(*args, **kwargs):
        raise AssertionError("mlx-lm's attention was asked")

    plugin, arguments = Plugin(), {"cache": None, "scale": 1.0, "mask": None}
    plugin_manager().register(plugin)
    installation.attention_backends.cache_clear()
    try:
        found = base.scaled_dot_product_attention(
            lambda queries, keys, values, cache, scale, mask, sinks=None: refuse(),
            None, problem, arguments,
        )  # fmt: skip
    finally:
        plugin_manager().unregister(plugin)
        installation.attention_backends.cache_clear()
    expected = FORMAT.turn_back(mx.ones_like(problem[0]))
    assert mx.allclose(found, expected, atol=1e-5)
