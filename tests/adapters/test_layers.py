"""Rows with adapters of their own, layer by layer: each computes what it would alone."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_optiq_ext.adapters import (
    AdapterActivation,
    MountedAdapter,
    mixed,
    prepare_model_for_mounted_lora,
)
from mlx_optiq_ext.adapters.activation import Route, Rows, select
from mlx_optiq_ext.adapters.proof import rows_apart
from mlx_optiq_ext.errors import UnsupportedError
from mlx_optiq_ext.lora import Adapter, LayerAdapter

EXPERTS, WIDE, INNER = 6, 32, 64


class Model(nn.Module):
    """An embedding, a linear layer and a block of experts, each of which LoRA can adapt."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, WIDE)
        self.proj = nn.Linear(WIDE, WIDE)
        self.gate = nn.Linear(WIDE, EXPERTS, bias=False)
        self.experts = SwitchGLU(WIDE, INNER, EXPERTS)
        self.flat = nn.Linear(WIDE, WIDE)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.proj(x)
        chosen = mx.stop_gradient(mx.argpartition(-self.gate(x), kth=1, axis=-1)[..., :2])
        x = x + self.experts(x, chosen).sum(axis=-2)
        x = x + self.flat(x.reshape(-1, WIDE)).reshape(x.shape)
        return self.embed.as_linear(x)


def made(model, names, ranks, dtype=mx.float32):
    """Mounts random adapters on every layer; the last leaves the experts alone."""
    mounts = prepare_model_for_mounted_lora(model)
    found = []
    for name, rank in zip(names, ranks, strict=True):
        layers = {}
        for path in ("proj", "flat"):
            layers[path] = (WIDE, WIDE)
        layers["embed"] = (50, WIDE)
        update = {
            path: LayerAdapter(normal(i, rank), normal(rank, o), 1.5)
            for path, (i, o) in layers.items()
        }
        if name != names[-1]:
            for part, (i, o) in {"up": (WIDE, INNER), "down": (INNER, WIDE)}.items():
                a, b = normal(EXPERTS, rank, i), normal(EXPERTS, o, rank)
                update[f"experts.{part}_proj"] = LayerAdapter(a, b, 1.5)
        update = {
            path: LayerAdapter(x.a.astype(dtype), x.b.astype(dtype), x.scale)
            for path, x in update.items()
        }
        found.append(mounts.mount(name, Adapter(name, Path(), "mlx-lm", update, {})))
    return mounts, found


def normal(*shape):
    return mx.random.normal(shape) * 0.3


@pytest.mark.parametrize("length", [1, 3, 40])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 5, 9)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_a_row_of_a_mixed_batch_computes_what_it_does_alone(length, bits, ranks, dtype):
    mx.random.seed(length)
    model = Model()
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    tokens = mx.random.randint(0, 50, (6, length))
    base = model(tokens)
    _, (a, b, c) = made(model, "abc", ranks, dtype)
    rows = (a, None, c, b, a, None)
    with AdapterActivation(select(rows)):
        mixed = model(tokens)
    for row, adapter in enumerate(rows):
        with AdapterActivation(adapter):
            alone = model(tokens[row : row + 1])[0]
        assert mx.allclose(mixed[row], alone, rtol=1e-3, atol=1e-3).item(), row
        if adapter is None:
            assert mx.array_equal(mixed[row], base[row])
        else:
            assert not mx.allclose(mixed[row], base[row], atol=1e-2).item()


def test_rows_that_agree_take_the_short_cut():
    a, b = (MountedAdapter(name, "1", "here", 0) for name in "ab")
    assert select([]) is None
    assert select([None, None]) is None
    assert select([a, a, a]) is a
    rows = select([a, None, b])
    assert isinstance(rows, Rows)
    (only,), (both,) = rows.routes((b,)), rows.routes((a, b))
    assert [only.slots.tolist(), both.slots.tolist()] == [[0, 0, 0], [0, 0, 1]]
    assert only.keep is not None
    assert both.keep is not None
    assert only.keep.tolist() == [False, False, True]
    assert both.keep.tolist() == [True, False, True]
    assert only.scales is None
    assert rows.routes((MountedAdapter("c", "1", "here", 0),)) == ()
    (everywhere,) = Rows((a, b)).routes((b, a))
    assert everywhere.keep is None


def test_rows_with_sums_are_routed_once_for_each_adapter_of_a_row():
    a, b = (MountedAdapter(name, "1", "here", 0) for name in "ab")
    both, half = mixed([(b, 1.0), (a, 2.0)]), mixed([(a, 0.5)])
    assert select([both, mixed([(a, 2.0), (b, 1.0)])]) == both
    first, second = Rows((None, a, both, half)).routes((b, a))
    assert first.slots.tolist() == [0, 1, 1, 1]
    assert second.slots.tolist() == [0, 0, 0, 0]
    assert [each.keep is not None and each.keep.tolist() for each in (first, second)] == [
        [False, True, True, True],
        [False, False, True, False],
    ]
    assert first.scales is not None
    assert first.scales.tolist() == [1.0, 1.0, 2.0, 0.5]
    assert second.scales is None


def test_what_another_adapter_overflows_to_does_not_reach_a_row():
    route = Route(mx.array([0, 0]), mx.array([False, True]))
    z = mx.array([[[float("inf")]], [[2.0]]])
    assert route.masked(z).tolist() == [[[0.0]], [[2.0]]]


def test_a_batch_of_another_size_is_refused():
    with pytest.raises(UnsupportedError, match="3 rows for a batch of 2"):
        Route(mx.array([0, 1]), None).by_row(mx.zeros((3, 1, 4)))


class Transposed(Model):
    """A model whose layers see their batch in another order."""

    def __call__(self, tokens):
        x = self.proj(self.embed(tokens).swapaxes(0, 1).reshape(-1, WIDE))
        return self.embed.as_linear(x.reshape(tokens.shape[1], -1, WIDE).swapaxes(0, 1))


def test_models_that_mix_rows_up_are_found_out():
    for kind, expected in ((Model, True), (Transposed, False)):
        model = kind()
        mounts, (adapter, *_) = made(model, "ab", (4, 4))
        assert rows_apart(mounts, adapter) is expected


def test_unmounting_restores_blocks_of_experts():
    model = Model()
    before = dict(model.named_modules())
    mounts, adapters = made(model, "abc", (4, 4, 4))
    assert dict(model.named_modules()).keys() != before.keys()
    for adapter in adapters:
        mounts.unmount(adapter.name)
    after = dict(model.named_modules())
    assert after.keys() == before.keys()
    assert all(after[path] is module for path, module in before.items())
