"""What refinement and its backward pass hold: a layer's working set, not every layer's states."""

from dataclasses import replace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from toy_fixtures import unmeasured
from toy_qwen3 import TEXT, write_toy

from mlx_optiq_ext.model.layerwise import outlines, recordings
from mlx_optiq_ext.model.spill import Spill
from mlx_optiq_ext.planning import Sampling
from mlx_optiq_ext.weights import Precision
from mlx_optiq_ext.weights.rounding.inputs import Fed, ReferenceInputs, expert_metrics, expert_parts
from mlx_optiq_ext.weights.rounding.refinement import refine
from mlx_optiq_ext.weights.sensitivity.fisher import factors
from mlx_optiq_ext.weights.sensitivity.moments import Factors

pytestmark = pytest.mark.newest

TOKENS = mx.arange(64).reshape(2, 32) * 37 % 1000


def peak(run):
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    found = run()
    return mx.get_peak_memory() - before, found


def outlined(model):
    found = outlines(model, [TOKENS])
    assert found is not None
    return found[0]


def test_outlines_are_recordings_without_what_layers_compute(loaded):
    model = loaded[0]
    outline, (recording,) = outlined(model), recordings(model, [TOKENS])
    hidden = outline[0].hidden
    for call, known in zip(outline, recording, strict=True):
        assert mx.array_equal(call.hidden, recording[0].hidden)
        assert call.entered(hidden).args[1:] == known.args[1:]
        assert call.kwargs == known.kwargs
        hidden = model.layers[call.index](hidden, *call.args[1:], **call.kwargs)
        assert mx.array_equal(hidden, known.hidden_out)


def test_reference_inputs_are_the_same_computed_once_more(loaded):
    model = loaded[0]
    layer, outline = model.layers[0], outlined(model)
    modules = {"q": layer.self_attn.q_proj, "down": layer.mlp.down_proj}
    run = lambda call, hidden: layer(hidden, *call.args[1:], **call.kwargs)  # noqa: E731
    calls = [outline[0], outline[0]]
    kept = ReferenceInputs(modules, calls, run)
    again = ReferenceInputs(modules, calls, run, held=0)
    wanted = mx.array(kept.fed(1, "down").inputs)
    rounded = modules["q"].weight = mx.zeros_like(modules["q"].weight)
    assert mx.array_equal(again.fed(1, "down").inputs, wanted)
    assert modules["q"].weight is rounded
    assert kept.stages == again.stages == [["q"], ["down"]]
    assert mx.array_equal(kept.outputs[1], again.outputs[1])


def test_hidden_states_on_disk_give_the_same_factors(loaded, tmp_path):
    model, spill = loaded[0], Spill(tmp_path)
    found = [
        {path: f for block in factors(model, [TOKENS], spill=each) for path, f in block.items()}
        for each in (None, spill)
    ]
    for path, one in found[0].items():
        assert isinstance(one, Factors)
        for name, array in one.arrays().items():
            assert mx.array_equal(array, found[1][path].arrays()[name]), (path, name)
    assert list(tmp_path.iterdir())


def test_memory_does_not_grow_with_the_layers(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 80)

    def taken(layers):
        folder = write_toy(tmp_path / str(layers), layers=layers)
        model, tokenizer = mlx_lm.load(str(folder))[:2]
        problem = unmeasured(
            model,
            tokenizer,
            calibration=tmp_path / "text.txt",
            sampling=Sampling(length=64, count=4, refining=24),
        )
        problem.findings.factors = {t.path: Factors() for t in problem.tensors}
        plan = {t.path: Precision(3, 64) for t in problem.tensors if "down" in t.path}
        states = problem.calibration.refining.size * 64 * 4
        return peak(lambda: refine(problem, plan))[0], states

    few, _ = taken(2)
    many, states = taken(10)
    assert many - few < 4 * states  # with every layer's states it would be eight


def test_moments_of_256_experts_take_the_stated_bytes():
    experts, size, limit = 256, 64, 1 << 18
    rng = np.random.default_rng(0)
    feds = [
        Fed(mx.array(rng.normal(size=(512, 1, size)), mx.float32), mx.array(chosen), (512, 1))
        for chosen in rng.integers(0, experts, (2, 512))
    ]
    mx.eval([(fed.inputs, fed.indices) for fed in feds])
    every = 4 * experts * size * size

    def run(parts):
        found = 0
        for some, metric in expert_metrics(feds, experts, parts):
            assert len(parts) == 1 or metric.moment.nbytes <= limit / 2
            found += len(range(experts)[some])
            mx.eval(metric.moment)
            del metric
        return found

    taken, found = peak(lambda: run(expert_parts(experts, size, limit)))
    assert found == experts
    # The moments as a list and as one array, and the rows of a batch.
    assert taken < 3 * limit + 8 * 512 * size * 4 < every / 2
    assert peak(lambda: run([slice(0, experts)]))[0] > every


def test_a_smaller_last_batch_is_not_kept_alone(loaded):
    model = loaded[0]
    layer, outline = model.layers[0], outlined(model)
    modules = {"down": layer.mlp.down_proj}
    run = lambda call, hidden: layer(hidden, *call.args[1:], **call.kwargs)  # noqa: E731
    first = outline[0]
    last = replace(first, args=(first.hidden[:1], *first.args[1:]))
    bytes_of = ReferenceInputs(modules, [first], run).fed(0, "down").inputs.nbytes
    some = ReferenceInputs(modules, [first, last], run, held=bytes_of)
    assert some.fed(0, "down").inputs.shape[0] == first.hidden.shape[0]
    assert some.fed(1, "down").inputs.shape[0] == 1
