import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from toy_fixtures import unmeasured
from toy_qwen3 import moe

from mlx_optiq_ext.model.layers import quantizable
from mlx_optiq_ext.model.taps import Use, tapped
from mlx_optiq_ext.planning.calibration import Sampling
from mlx_optiq_ext.weights import Precision
from mlx_optiq_ext.weights.precision import dequantized
from mlx_optiq_ext.weights.sensitivity import fisher as module
from mlx_optiq_ext.weights.sensitivity.fisher import factors
from mlx_optiq_ext.weights.sensitivity.kl import probe
from mlx_optiq_ext.weights.sensitivity.moments import Factors
from mlx_optiq_ext.weights.sensitivity.taylor import Taylor

pytestmark = pytest.mark.newest

TOKENS = mx.array([[5, 9, 200, 31, 7, 44, 81, 3], [8, 8, 100, 2, 64, 12, 900, 77]])


def gathered(model) -> dict[str, Factors]:
    return {path: f for block in factors(model, [TOKENS]) for path, f in block.items()}


def array(value):
    return np.array(value, np.float64)


def test_taps_see_both_uses_of_a_tied_embedding(loaded):
    model, seen = loaded[0], []

    def see(use: Use) -> mx.array:
        seen.append((use.path, use.lookup))
        return use.outputs

    plain = model(TOKENS)
    with tapped(dict(quantizable(model)), see):
        assert mx.array_equal(model(TOKENS), plain)
    uses = [lookup for path, lookup in seen if path == "model.embed_tokens"]
    assert uses == [True, False]
    assert len(seen) == 2 + 7 * len(model.layers)


def test_by_layer_and_as_a_whole_give_the_same_factors(loaded, monkeypatch):
    model = loaded[0]
    by_layer = gathered(model)
    monkeypatch.setattr(module, "recordings", lambda *args: [[]])
    whole = gathered(model)
    assert set(by_layer) == set(whole) == {path for path, _ in quantizable(model)}
    for path, found in by_layer.items():
        for name in ("inputs", "outputs", "lookups", "columns"):
            one, other = getattr(found, name), getattr(whole[path], name)
            assert (one is None) == (other is None), (path, name)
            if one is not None:
                scale = float(mx.abs(other).max())
                assert float(mx.abs(one - other).max()) <= 1e-4 * scale + 1e-9, (path, name)


def test_outputs_are_the_squared_gradients_of_what_was_drawn(loaded):
    model, path = loaded[0], "model.layers.1.mlp.down_proj"
    found = gathered(model)[path]
    layer = model.layers[1].mlp.down_proj
    drawn = module.score(model(TOKENS), mx.random.key(0))

    def loss(offset):
        with tapped({path: layer}, lambda use: use.outputs + offset):
            return (model(TOKENS) * drawn).sum()

    gradient = mx.grad(loss)(mx.zeros((*TOKENS.shape, 64)))
    expected = array(mx.square(gradient).sum(axis=(0, 1)))
    assert array(found.outputs) == pytest.approx(expected, rel=1e-3)
    assert found.tokens == TOKENS.size


def test_draws_have_the_hessian_of_the_divergence_as_covariance():
    logits = mx.array([[[2.0, 0.5, -1.0, 1.0]]])
    many = mx.broadcast_to(logits, (1, 200_000, 4))
    drawn = array(module.score(many, mx.random.key(3)))[0]
    p = array(mx.softmax(logits[0, 0]))
    hessian = np.diag(p) - np.outer(p, p)
    assert drawn.mean(axis=0) == pytest.approx(0, abs=5e-3)
    assert drawn.T @ drawn / len(drawn) == pytest.approx(hessian, abs=3e-3)
    assert array(module.score(logits, mx.random.key(1))).sum() == pytest.approx(0, abs=1e-6)


def test_costs_follow_the_formula():
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(50, 4)), rng.normal(size=(50, 3))
    found = Factors(mx.array(x.T @ x), mx.array((g**2).sum(0)), tokens=50)
    error = rng.normal(size=(3, 4))
    moment = x.T @ x / 50
    expected = sum(0.5 * (g[:, k] ** 2).mean() * error[k] @ moment @ error[k] for k in range(3))
    assert found.curvature().kl(mx.array(error)) == pytest.approx(expected, rel=1e-4)
    assert Factors(tokens=50).curvature().kl(mx.array(error)) == 0


def test_expert_costs_count_each_experts_own_tokens():
    rng = np.random.default_rng(1)
    x, g = rng.normal(size=(60, 4)), rng.normal(size=(60, 3))
    expert = rng.integers(0, 2, size=60)
    found = Factors(tokens=60)
    use = Use(
        "experts",
        mx.array(x)[:, None, :],
        mx.array(expert),
        mx.zeros((60, 1, 3)),
    )
    found.add(use, mx.array(g)[:, None, :], (2, 3, 4))
    error = rng.normal(size=(2, 3, 4))
    expected = 0.0
    for e in range(2):
        own = expert == e
        squares = (error[e] ** 2) @ (x[own] ** 2).mean(0)
        expected += 0.5 * own.mean() * ((g[own] ** 2).mean(0) * squares).sum()
    assert found.curvature().kl(mx.array(error)) == pytest.approx(expected, rel=1e-4)


def test_predicted_divergence_is_near_the_measured_one(tiny):
    model, tokenizer = mlx_lm.load(str(tiny))[:2]
    text, sampling = tiny.parent / "calibration.jsonl", Sampling(length=64)
    problem = unmeasured(model, tokenizer, calibration=text, sampling=sampling)
    taylor, direct = Taylor().measure(problem), probe(problem, problem.tensors[::4])
    paths = list(direct)
    predicted = np.log([taylor[path][Precision(3, 64)] for path in paths])
    measured = np.log([direct[path] for path in paths])
    assert len(paths) > 8
    assert np.corrcoef(predicted, measured)[0, 1] > 0.8
    assert abs(np.median(predicted - measured)) < np.log(2)


def test_stacked_experts_are_factored_per_expert():
    model = moe()
    found = gathered(model)
    experts = {path: f for path, f in found.items() if "switch_mlp" in path}
    assert len(experts) == 6
    for path, f in experts.items():
        assert f.uses is not None, path
        assert float(f.uses.sum()) == TOKENS.size * 2, path
        assert f.outputs is not None, path
        weight = dict(quantizable(model))[path].weight
        assert f.outputs.shape == weight.shape[:2]
        error = dequantized(weight, Precision(3, 32), mx.float32) - weight
        assert f.curvature().kl(error) > 0


def test_the_model_is_left_as_it_was(loaded):
    model = loaded[0]
    model.eval()
    plain, classes = model(TOKENS), [type(m) for m in model.modules()]
    gathered(model)
    assert mx.array_equal(model(TOKENS), plain)
    assert [type(m) for m in model.modules()] == classes
    assert not model.training
