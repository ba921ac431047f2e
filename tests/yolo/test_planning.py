"""Measuring, choosing and judging on a network small enough to check by hand."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_optiq_ext.errors import BudgetError, InputError
from mlx_optiq_ext.yolo import archive, hessian, network, pipeline, steps
from mlx_optiq_ext.yolo.divergence import divergence
from mlx_optiq_ext.yolo.network import Outputs
from mlx_optiq_ext.yolo.steps import Detector

from .tiny_network import Tiny, pictures


@pytest.fixture(scope="module")
def study():
    mx.random.seed(3)
    model = Tiny()
    for block in (model.first, model.second):
        block.bn.running_var = mx.random.uniform(0.2, 1, (48,))
        block.bn.running_mean = mx.random.normal((48,)) * 0.2
    mx.eval(model.parameters())
    arrays = {name: np.array(a) for name, a in network.parameters(model).items()}
    found = network.layers(model)
    measured = hessian.measure(model, found, pictures(4), draws=64)
    return model, Detector(tuple(found), arrays, measured)


def test_one_image_at_least_is_kept_to_judge_on(study):
    four = pictures(4)
    for count in (2, 3, 4):
        calibrating, judging = pipeline.split(four[:count])
        assert [len(calibrating), len(judging)] == [count - 1, 1]
    with pytest.raises(InputError, match="the only image to calibrate on, and none is left"):
        pipeline.split(four[:1])


def restore(model, detector):
    steps.fill(model, detector.arrays)


def test_layers_come_in_order_with_their_normalization(study):
    _, detector = study
    assert [layer.path for layer in detector.layers] == [
        "first.conv", "last", "second.conv", "spare.conv"
    ]  # fmt: skip
    assert detector.layers[0].norm_path == "first.bn"
    assert detector.layers[1].norm is None


def test_a_layer_that_is_never_called_is_known(study):
    measured = study[1].measured
    unused = [layer.path for layer in study[1].layers if measured.unused(layer.path)]
    assert unused == ["spare.conv"]


def test_divergence_is_zero_on_itself_and_grows(study):
    model, detector = study
    restore(model, detector)
    out = network.outputs(model, pictures(1)[0].pixels)
    same = divergence(out, out)
    assert same.classes == pytest.approx(0, abs=1e-4)
    assert same.boxes == pytest.approx(0, abs=1e-3)
    worse = [
        divergence(
            out, Outputs(out.boxes + shift, mx.clip(out.scores + shift / 50, 0, 1), out.extra, None)
        )
        for shift in (0.5, 1.0, 2.0)
    ]
    assert sorted(worse, key=lambda d: d.total) == worse
    assert worse[0].classes > 0 < worse[0].boxes


def test_overlap_counts_by_hand():
    from mlx_optiq_ext.yolo.divergence import overlap

    a = mx.array([[5.0, 5, 10, 10], [5, 5, 10, 10], [5, 5, 10, 10]])
    b = mx.array([[5.0, 5, 10, 10], [10, 5, 10, 10], [50, 50, 10, 10]])
    assert np.allclose(np.array(overlap(a, b)), [1, 50 / 150, 0])


@pytest.mark.parametrize("path", ["first.conv", "second.conv", "last"])
def test_curvature_foretells_the_kl_divergence_of_small_errors(study, path):
    model, detector = study
    layer = next(layer for layer in detector.layers if layer.path == path)
    draw = np.random.default_rng(4)
    shape = layer.module.weight.shape
    measured = []
    restore(model, detector)
    images = pictures(4)
    before = [network.outputs(model, p.pixels) for p in images]
    mx.eval([out.arrays() for out in before])
    for _ in range(24):
        noise = draw.standard_normal(shape).astype(np.float32) * 0.003
        layer.module.weight = mx.array(detector.arrays[f"{path}.weight"] + noise)
        for picture, reference in zip(images, before, strict=True):
            out = network.outputs(model, picture.pixels)
            kl = divergence(reference, out).classes
            # The squared shift stands for the overlap error in the curvature.
            side = mx.maximum(reference.boxes[:, 2:], hessian.LEAST_SIDE)
            shift = (out.boxes - reference.boxes) / mx.concatenate([side, side], axis=1)
            weight = reference.scores.max(-1)[:, None]
            measured.append(kl + hessian.BOX_WEIGHT * (weight * shift * shift).sum().item())
    restore(model, detector)
    foretold = detector.measured.curvature[path].sum() * 0.003**2
    assert np.mean(measured) == pytest.approx(foretold, rel=0.35)


@pytest.mark.parametrize("budget", [3.0, 4.5, 7.0])
def test_the_file_is_as_large_as_planned_and_within_the_budget(study, tmp_path, budget):
    _, detector = study
    for rule in steps.RULES:
        plan, stored = steps.plan(detector, budget, rule)
        named = {steps.file_name(n): a for n, a in stored.items()}
        size = archive.write(tmp_path / f"{rule}.npz", named)
        assert size == plan.file_bytes <= budget * detector.parameters / 8
        assert stored.keys() == detector.arrays.keys()
        assert {n: a.shape for n, a in stored.items()} == {
            n: a.shape for n, a in detector.arrays.items()
        }
        assert plan.choices["spare.conv"].factor == 0


def test_more_bytes_never_cost_more(study):
    _, detector = study
    plans = [steps.plan(detector, budget, "even")[0] for budget in (2.5, 3.5, 5, 7)]
    costs = [sum(c.error for c in p.choices.values()) for p in plans]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0]


def test_a_budget_below_the_coarsest_file_is_refused_with_the_least(study):
    with pytest.raises(BudgetError, match=r"1 bits per weight is too small .* takes \d+\.\d\d"):
        steps.plan(study[1], 1, "even")


@pytest.mark.parametrize("damaged", ["curvature", "weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_refused_naming_the_layer(study, damaged, value):
    _, detector = study
    curvature = {path: each.copy() for path, each in detector.measured.curvature.items()}
    arrays = {name: each.copy() for name, each in detector.arrays.items()}
    changed = curvature["second.conv"] if damaged == "curvature" else arrays["second.conv.weight"]
    changed.flat[7] = value
    measured = replace(detector.measured, curvature=curvature)
    named = r"second\.conv(\.weight holds numbers that are| is) not finite"
    with pytest.raises(InputError, match=named):
        steps.plan(replace(detector, arrays=arrays, measured=measured), 5.0, "even")


def test_protected_layers_keep_fine_steps(study):
    _, detector = study
    free, _ = steps.plan(detector, 3, "even")
    guarded = Detector(
        detector.layers, detector.arrays, detector.measured, frozenset({"first.conv"})
    )
    plan, stored = steps.plan(guarded, 3.3, "even")
    assert plan.choices["first.conv"].factor < free.choices["first.conv"].factor
    reach = np.abs(stored["first.conv.weight"].astype(int).reshape(48, -1)).max(1)
    assert reach.min() >= steps.PROTECTED_LEVELS


def test_the_plan_that_judges_best_is_kept(study):
    model, detector = study
    restore(model, detector)
    images = pictures(2)
    references = [(p, network.outputs(model, p.pixels)) for p in images]
    mx.eval([r.arrays() for _, r in references])
    best, stored = steps.best(detector, 4, model, references)
    errors = {
        rule: steps.judge(model, steps.plan(detector, 4, rule)[1], references).total
        for rule in steps.RULES
    }
    assert best.error is not None
    assert best.error.total == pytest.approx(min(errors.values()))
    assert steps.judge(model, stored, references).total == pytest.approx(best.error.total)
    restore(model, detector)
    assert (
        best.error.total
        < steps.judge(model, steps.plan(detector, 2.8, best.rule)[1], references).total
    )
    restore(model, detector)
