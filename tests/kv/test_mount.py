"""What mounting a plan finds out about a model is said, and what fails is not taken for it."""

from dataclasses import dataclass

import mlx.core as mx
import pytest
from toy_models import build

import mlx_optiq_ext
from mlx_optiq_ext import kv
from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.kv.formats import Affine

pytestmark = pytest.mark.newest

PLAN = kv.KVPlan("4", everywhere=kv.LayerFormat(Affine(4), Affine(4)))
SAID = {
    "stablelm": "computes attention itself: keys and values are unpacked for it (AttributeError",
    "nemotron-nas": "cannot batch packed keys and values: one request at a time (TypeError",
}


@pytest.mark.parametrize("name", SAID)
def test_another_way_to_run_is_said_once_and_stands_in_the_status(name, capsys):
    for _ in range(2):
        mounted = kv.mount(build(name), PLAN)
    assert (mounted.dense, mounted.mergeable) != (False, True)
    said = capsys.readouterr().err
    assert said.count(SAID[name]) <= 1  # another test may have been first
    assert f"mlx_lm.models.{name} {SAID[name]}" in mlx_optiq_ext.status()


@pytest.mark.parametrize(
    "failure", [MemoryError(), RuntimeError("[malloc] Unable to allocate 8 bytes.")], ids=repr
)
def test_what_fails_for_want_of_memory_is_raised(failure):
    @dataclass(frozen=True)
    class Failing(Affine):
        packed_by_kernel = False

        def fitted(self, dim):
            return self

        def pack(self, array):
            raise failure

    model = build("qwen3")
    plan = kv.KVPlan("failing", everywhere=kv.LayerFormat(Failing(4), Failing(4)))
    with pytest.raises(type(failure)) as raised:
        kv.mount(model, plan)
    assert raised.value is failure
    assert kv.mounted_on(model) is None


def test_layers_whose_keys_and_values_may_share_arrays_are_known():
    model = build("qwen3")
    assert not kv.mount(model, PLAN).alike  # in float32 no kernel reads them
    model.set_dtype(mx.bfloat16)
    mounted = kv.mount(model, PLAN)
    assert mounted.alike == mounted.formats.keys()


def test_damaged_weights_are_named():
    model, plan = build("qwen3"), kv.parse_spec("4")
    assert plan is not None
    attention = model.model.layers[1].self_attn
    attention.k_proj.weight = attention.k_proj.weight * float("nan")
    with pytest.raises(InputError, match="layer 1: keys or queries are not finite: are the model"):
        kv.mount(model, plan)
