"""One step's gradients against those of the plain model."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

from mlx_optiq_ext.planning.parts import Parts
from mlx_optiq_ext.weights.precision import Precision, quantize
from mlx_optiq_ext.weights.rounding.distillation import placed
from mlx_optiq_ext.weights.rounding.distillation.divergence import chunked, divergence
from mlx_optiq_ext.weights.rounding.distillation.grids import Grid, Parameter
from mlx_optiq_ext.weights.rounding.distillation.student import SCALE, Student, looked_up

pytestmark = pytest.mark.newest

PATHS = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.5.mlp.down_proj.weight",
)
NORMS = ("model.layers.1.input_layernorm.weight", "model.norm.weight")
TOKENS = mx.arange(36).reshape(2, 18) * 27 % 1000


@pytest.fixture
def model(tiny):
    model = mlx_lm.load(str(tiny))[0]
    model.set_dtype(mx.float32)
    return model.train()


def parameter(model, path):
    modules = dict(model.named_modules())
    return modules[path.rpartition(".")[0]][path.rpartition(".")[2]]


def student(model, parts, *, checkpoint=False, dtype=mx.float32):
    movable, states = {}, {}
    for path in PATHS:
        weight = parameter(model, path)
        grid = Grid(Precision(3, 32), mx.bfloat16, dtype, True)
        words, *grids = quantize(weight, grid.precision)
        stored = (words, *(g.astype(mx.bfloat16) for g in grids))
        movable[path], states[path] = grid, grid.start(stored, weight, 0.5)
    for path in NORMS:
        movable[path] = Parameter(mx.float32, dtype)
        states[path] = movable[path].start(parameter(model, path) * 1.1)
    return Student(parts, movable, checkpoint), states


def plain(model, weights):
    """KL and its gradients with the whole logits at once."""
    expected = model(TOKENS)

    def loss(weights):
        with placed(model, weights):
            return divergence(expected, model(TOKENS)).mean()

    return mx.value_and_grad(loss)(weights)


@pytest.mark.parametrize("form", ["kept", "recomputed", "in one piece"])
def test_gradients_are_those_of_the_plain_model(model, form):
    parts = Parts.of(model, 2, 18, limit=4 * 1024 * 10)
    assert parts.tokens == 9
    if form == "in one piece":  # as where layers do not hand on a hidden state plainly
        parts = replace(parts, recording=None, dim=1024)
    one, states = student(model, parts, checkpoint=form == "recomputed")
    expected = parts.body(TOKENS)
    gradients, kl = one._gradients(states, TOKENS, expected)
    weights = one.weights(states, list(one.movable))
    wanted_kl, wanted = plain(model, weights)
    assert float(kl) == pytest.approx(float(wanted_kl), rel=1e-4)
    assert float(one.judged(states, TOKENS, expected)) == pytest.approx(float(wanted_kl), rel=1e-4)
    assert gradients.keys() == wanted.keys()
    for path, gradient in gradients.items():
        gradient = gradient / SCALE
        scale = float(mx.abs(wanted[path]).max())
        assert mx.allclose(gradient, wanted[path], rtol=1e-3, atol=1e-4 * scale), path


def test_gradients_do_not_vanish_in_float16(model):
    exact, states = student(model, Parts.of(model, 2, 18))
    wanted, _ = exact._gradients(states, TOKENS, exact.parts.body(TOKENS))
    model.set_dtype(mx.float16)
    halved, states = student(model, Parts.of(model, 2, 18), dtype=mx.float16)
    found, _ = halved._gradients(states, TOKENS, halved.parts.body(TOKENS))
    for path in PATHS:
        left = mx.square(found[path].astype(mx.float32) - wanted[path]).sum()
        assert float(left / mx.square(wanted[path]).sum()) < 0.05, path


@pytest.mark.parametrize("rows", [1, 4, 7, 20])
def test_chunks_add_up_to_the_whole(rows):
    mx.random.seed(0)
    weight, expected, hidden = (mx.random.normal(s) for s in ((50, 8), (10, 8), (10, 8)))
    other = {"w": weight + 0.1}

    def loss(weights, hidden):
        return divergence(expected @ weight.T, hidden @ weights["w"].T).mean()

    wanted, (of_weights, of_hidden) = mx.value_and_grad(loss, argnums=(0, 1))(other, hidden)
    kl, own, found = chunked(
        lambda rows: rows @ weight.T,
        lambda weights, rows: rows @ weights["w"].T,
        *(other, expected, hidden, rows),
    )
    assert float(kl) == pytest.approx(float(wanted), rel=1e-5)
    assert mx.allclose(own["w"], of_weights["w"], atol=1e-6)
    assert mx.allclose(found, of_hidden, atol=1e-6)


def test_logits_of_a_chunk_are_held_at_a_time():
    weight, expected = mx.random.normal((20_000, 8)), mx.random.normal((512, 8))
    other, hidden = {"w": weight + 0.1}, expected * 0.9
    mx.eval(weight, expected, other, hidden)

    def peak(rows):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(
            chunked(
                lambda rows: rows @ weight.T,
                lambda weights, rows: rows @ weights["w"].T,
                *(other, expected, hidden, rows),
            )
        )
        return mx.get_peak_memory() - before

    whole = 512 * 20_000 * 4  # bytes of logits in float32
    assert peak(16) < whole < 4 * whole < peak(512)


def test_looking_up_has_the_gradient_of_indexing():
    weight, tokens = mx.random.normal((12, 4)), mx.array([[3, 0, 3], [11, 3, 0]])
    shares = mx.random.normal((2, 3, 4))
    functions: tuple[Any, ...] = (looked_up, lambda w, t: w[t])
    found, wanted = (
        mx.grad(lambda w, f=f: (f(w, tokens) * shares).sum())(weight) for f in functions
    )
    assert mx.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("anchor", [0, 0.9, 1])
def test_a_grid_starts_at_what_is_stored(bits, anchor):
    weight = mx.random.normal((6, 64))
    grid = Grid(Precision(bits, 32), mx.float32, mx.float32, True)
    stored = quantize(weight, grid.precision)
    words, *grids = grid.quantized(grid.start(stored, weight + 0.3, anchor))
    assert mx.array_equal(words, stored[0])
    assert all(mx.allclose(a, b, atol=1e-5) for a, b in zip(grids, stored[1:], strict=True))


def test_a_weight_moves_to_the_next_code_and_no_further_than_the_last():
    weight = mx.random.normal((4, 32))
    grid = Grid(Precision(2, 32), mx.float32, mx.float32, True)
    state = grid.start(quantize(weight, grid.precision), weight, 0.0)
    still = {name: mx.zeros_like(state[name]) for name in ("scale", "centre")}
    codes = grid._codes(state)
    down = {**still, "codes": mx.full(weight.shape, 0.51)}
    for _ in range(3):  # half a step is the most that one update moves
        state = grid.moved(state, down, mx.random.key(0))
    assert mx.array_equal(grid._codes(state), mx.maximum(codes.astype(mx.int32) - 1, 0))
    for key in range(8):
        state = grid.moved(state, down, mx.random.key(key))
    assert int(grid._codes(state).max()) == 0
    for key in range(16):
        state = grid.moved(state, {**still, "codes": -down["codes"]}, mx.random.key(key))
    assert int(grid._codes(state).min()) == 3


def test_moves_too_small_for_a_place_are_made_on_average():
    weight = mx.random.normal((64, 64))
    grid = Grid(Precision(4, 64), mx.float32, mx.float32, True)
    state = grid.start(quantize(weight, grid.precision), weight, 0.0)
    before = state["codes"].astype(mx.float32).mean()
    still = {name: mx.zeros_like(state[name]) for name in ("scale", "centre")}
    for key in range(40):
        moves = {**still, "codes": mx.full(weight.shape, 1 / 2560)}
        state = grid.moved(state, moves, mx.random.key(key))
    assert float(before - state["codes"].astype(mx.float32).mean()) == pytest.approx(4, abs=0.3)


def test_a_fused_update_is_the_plain_one(model):
    parts = Parts.of(model, *TOKENS.shape)
    expected, results = parts.body(TOKENS), []
    for fused in (False, True):
        one, states = student(model, parts)
        one = replace(one, fused=fused)
        rates = {name: mx.array(0.01) for name in ("scale", "centre", "codes", "value")}
        ones = [mx.array(1.0), mx.array(1.0)]
        key = mx.random.key(3)
        results.append(one.step(states, one.moments(states), TOKENS, expected, key, rates, ones))
    (plain, moments, kl), (fused, fused_moments, fused_kl) = results
    assert kl.item() == pytest.approx(fused_kl.item(), rel=1e-5)
    for path in plain:
        for name in plain[path].keys() - {"codes"}:
            assert mx.allclose(plain[path][name], fused[path][name], rtol=1e-4, atol=1e-6)
        for name in moments[path]:
            assert mx.allclose(moments[path][name], fused_moments[path][name], rtol=1e-3)
    for path in PATHS:
        off = mx.abs(plain[path]["codes"].astype(mx.int32) - fused[path]["codes"])
        assert bool((off <= 1).all())
