"""Integer codes in place of a weight change nothing but its rounding."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_optiq_ext.yolo.codes import RULES, channel_steps, encoded, mean_shift, quantized
from mlx_optiq_ext.yolo.network import Layer

DRAW = np.random.default_rng(2)


@pytest.fixture(autouse=True)
def same_draws(monkeypatch):
    monkeypatch.setattr(f"{__name__}.DRAW", np.random.default_rng(2))


def layer(kind, norm=True):
    conv, channels = {
        "conv": (nn.Conv2d(6, 8, 3, padding=1, bias=False), 8),
        "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), 6),
        "biased": (nn.Conv2d(6, 8, 1), 8),
        "transposed": (nn.ConvTranspose2d(6, 8, 2, stride=2), 8),
        "linear": (nn.Linear(6, 8), 8),
    }[kind]
    behind = nn.BatchNorm(channels, eps=1e-3) if norm else None
    if behind is not None:
        behind.running_mean = mx.array(DRAW.standard_normal(channels).astype(np.float32))
        behind.running_var = mx.array(DRAW.uniform(0.1, 4, channels).astype(np.float32))
        behind.weight = mx.array(DRAW.standard_normal(channels).astype(np.float32))
        behind.bias = mx.array(DRAW.standard_normal(channels).astype(np.float32))
        behind.eval()
    return Layer("a.conv", conv, behind, "a.bn" if norm else "", kind == "transposed")


def arrays(item):
    found = {"a.conv.weight": np.array(item.module.weight)}
    if "bias" in item.module:
        found["a.conv.bias"] = np.array(item.module.bias)
    if item.norm is not None:
        for name in ("weight", "bias", "running_mean", "running_var"):
            found[f"a.bn.{name}"] = np.array(item.norm[name])
    return found


def rounded_layer(*arguments):
    result = encoded(*arguments)
    assert result is not None
    return result


def run(item, stored, x):
    for name, array in stored.items():
        owner = item.module if name.startswith("a.conv") else item.norm
        setattr(owner, name.rpartition(".")[2], mx.array(array))
    y = item.module(x)
    return np.array(y if item.norm is None else item.norm(y))


KINDS = [(k, n) for k in ("conv", "depthwise", "biased", "transposed") for n in (True, False)]


@pytest.mark.parametrize(("kind", "norm"), [*KINDS, ("linear", False)])
def test_codes_compute_what_the_rounded_weight_computes(kind, norm):
    item = layer(kind, norm)
    own = arrays(item)
    x = mx.array(DRAW.standard_normal((1, 9, 9, 6)).astype(np.float32))
    weight = own["a.conv.weight"]
    steps = channel_steps(weight, np.ones_like(weight), "even") * 0.01
    stored, error = rounded_layer(item, own, steps, np.zeros(6))
    rounded = {**own, "a.conv.weight": (weight + error).astype(np.float32)}
    expected = run(item, rounded, x)
    found = run(item, stored, x)
    assert np.abs(error).max() < 0.02
    assert np.abs(found - expected).max() < 2e-3 * max(1, np.abs(expected).max())
    if norm:
        assert stored["a.conv.weight"].dtype in (np.int8, np.int16)
    else:
        assert stored["a.conv.weight"].dtype == np.float16


@pytest.mark.parametrize("kind", ["conv", "depthwise", "biased", "transposed"])
def test_the_mean_of_every_channel_survives_rounding(kind):
    item = layer(kind)
    own = arrays(item)
    inputs = DRAW.uniform(0.5, 2, 6).astype(np.float32)
    x = mx.broadcast_to(mx.array(inputs), (1, 16, 16, 6))
    weight = own["a.conv.weight"]
    steps = channel_steps(weight, np.ones_like(weight), "even")
    before = run(item, own, x)[0, 2:-2, 2:-2].mean((0, 1))
    stored, error = rounded_layer(item, own, steps, inputs)
    after = run(item, stored, x)[0, 2:-2, 2:-2].mean((0, 1))
    assert np.abs(mean_shift(error, inputs, item)).max() > 0.05
    assert np.abs(after - before).max() < 5e-3 * np.abs(before).max()


def test_steps_follow_curvature_and_spread():
    weight = DRAW.standard_normal((4, 1, 1, 64))
    weight[1] *= 4
    curvature = np.ones_like(weight)
    curvature[2] = 100
    plain, even = (channel_steps(weight, curvature, rule) for rule in RULES)
    assert plain[1] == pytest.approx(plain[0])
    assert plain[0] / plain[2] == pytest.approx(10, rel=0.2)
    assert even[1] / even[0] == pytest.approx(2, rel=0.2)
    assert np.exp(np.log(plain).mean()) == pytest.approx(weight.std())


def test_steps_stay_finite_where_nothing_is_known():
    for rule in RULES:
        steps = channel_steps(np.zeros((3, 2)), np.zeros((3, 2)), rule)
        assert np.isfinite(steps).all()
        assert (steps > 0).all()


def test_codes_grow_wider_and_then_stop():
    weight = np.array([[1, -1]], np.float32)
    found = [quantized(weight, np.array([step])) for step in (0.01, 0.001, 1e-6)]
    assert [codes if codes is None else codes.dtype for codes in found] == [np.int8, np.int16, None]
