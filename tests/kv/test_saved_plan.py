"""A saved prompt cache goes on only under the KV plan that it was saved with."""

import json
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models import cache as stock

from mlx_optiq_ext import kv
from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.kv import saved


def read(plan, tmp_path) -> kv.KVPlan:
    """A plan from a spec, or from entries."""
    if isinstance(plan, str):
        found = kv.parse_spec(plan)
        assert found is not None
        return found
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    return kv.read_plan(tmp_path / "plan.json")


@pytest.fixture
def keep(tiny, tmp_path, monkeypatch):
    """Saves a prompt cache with a plan, and loads it."""
    monkeypatch.setattr(stock, "PackedKVCache", kv.PackedKVCache, raising=False)
    model: Any = mlx_lm.load(str(tiny))[0]

    def keep(plan):
        kv.mount(model, read(plan, tmp_path))
        caches = kv.make_caches(model)
        mx.eval(model(mx.array([[1, 2, 3]]), cache=caches))
        stock.save_prompt_cache(str(tmp_path / "cache.safetensors"), caches)
        return stock.load_prompt_cache(str(tmp_path / "cache.safetensors"))

    return keep


def entries(*changes):
    """Entries of a plan of three layers, each changed or left out (None)."""
    made = [{"layer_idx": index, "bits": 8, "group_size": 32} for index in (0, 2, 3)]
    changes = [*changes, {}, {}, {}]
    return [made[i] | changes[i] for i in range(3) if changes[i] is not None]


EVERY = [{"layer_idx": index, "bits": 8} for index in range(6)]

SAME = {
    "width": ("8", "8"),
    "keys and values": ("k8v4g32", "k8v4g32"),
    "16 bits": ("16", "16"),
    "layers": (entries(), entries()),
    "all layers by a width": (EVERY, "8"),
    "a width by all layers": ("8", EVERY),
    "the group size that fits": ("8", "8g64"),
}

OTHER = {
    "width": ("8", "4", "layer 0 has k8g64v8g64, not k4g64xv4g64rs1"),
    "rotation": ("8", "8r", "layer 0 has k8g64v8g64, not k8g64rv8g64r"),
    "format": ("4", "4t", "layer 0 has k4g64xv4g64rs1n4, not k4tv4t"),
    "values": ("8", "k8v4", "layer 0 has k8g64v8g64, not k8g64v4g64"),
    "group size": ("8", "8g32", "layer 0 has k8g64v8g64, not k8g32v8g32"),
    "16 bits": ("8", "16", "layer 0 has k8g64v8g64, not k16v16"),
    "layers by a width": (entries(), "8g32", "not all of its layers are quantized"),
    "a layer's width": (entries(), entries({}, {"bits": 4}), "layer 2 has k8g32v8g32, not k4g32"),
    "one layer less": (entries(), entries({}, None), "layer 2 has k8g32v8g32, not k16v16"),
    "one layer more": (entries(None), entries(), "layer 0 is not quantized in it"),
    "another layer": (entries(), entries({"layer_idx": 1}), "layer 0 has k8g32v8g32, not k16v16"),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_plan_goes_on(keep, tmp_path, name):
    first, second = SAME[name]
    saved.check_plan(keep(first), read(second, tmp_path), tmp_path / "cache.safetensors")


@pytest.mark.parametrize("name", OTHER)
def test_another_plan_is_refused(keep, tmp_path, name):
    first, second, reason = OTHER[name]
    caches, plan = keep(first), read(second, tmp_path)
    with pytest.raises(InputError) as raised:
        saved.check_plan(caches, plan, tmp_path / "cache.safetensors")
    said = str(raised.value)
    assert f"was saved with another KV plan than --optiq-kv {plan.source} (" in said
    assert reason in said
