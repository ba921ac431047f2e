"""The parts of the benchmarks that compute or decide something, without their measurements."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx_lm
import never_worse
import numpy as np
import pytest
import scaling
import sensitivity
from rivals import generated, mlx_lm_quant, sweep
from rivals.process import last_line, measure, others

from mlx_optiq_ext import weights
from mlx_optiq_ext.weights.sensitivity.problem import end_to_end


def test_a_child_is_measured_and_a_failure_says_why(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(
        "import sys\nimport mlx.core as mx\nmx.eval(mx.ones((64, 1024, 1024)))\n"
        "print('done')\nsys.exit('no such thing' if len(sys.argv) > 1 else 0)\n"
    )
    fine = measure(sys.executable, str(script), log=tmp_path / "log")
    assert fine.failure is None
    assert fine.mlx_gib == pytest.approx(0.25, rel=0.01)
    assert 0.25 < fine.resident_gib < 2
    assert fine.seconds > 0
    assert "done" in (tmp_path / "log").read_text()
    assert measure(sys.executable, str(script), "fail").failure == "no such thing"


def test_others_are_what_our_child_did_not_use():
    assert others(100.0, 130.0, 10.0, 10.0) == 2.0
    assert others(100.0, 105.0, 10.0, 10.0) == 0.0
    assert others(None, None, 1.0, 1.0) is None
    assert last_line("one\r50%\rtwo \n\n") == "two"


def test_a_conversion_is_worse_only_beyond_two_standard_errors():
    other = [1.0, 2.0, 3.0, 4.0]
    assert never_worse.compared(other, other) == {"ratio": 1.0, "errors": 0.0, "worse": False}
    assert never_worse.compared([1.1, 2.1, 3.2, 4.2], other)["worse"]
    noisy = never_worse.compared([2.0, 1.0, 4.5, 3.5], other)
    assert noisy["ratio"] == pytest.approx(1.1)
    assert not noisy["worse"]


def test_a_larger_budget_that_ends_worse_is_found():
    def ended(budget, kl, model="a"):
        return {"model": model, "calibration": "text", "budget": budget, "held_out_kl": kl}

    assert never_worse.rising([ended(4, 0.2), ended(3, 0.5), ended(5, 0.3)]) == [(4, 5)]
    assert never_worse.rising([ended(4, 0.2), ended(5, 0.3, "b"), ended(3, 0.1)]) == []
    assert sum(map(len, never_worse.BUDGETS.values())) * 2 == 40


def flat(model) -> dict:
    from mlx.utils import tree_flatten

    return dict(tree_flatten(model.parameters()))


def test_a_model_comes_back_from_float32_as_it_was(tiny):
    model = mlx_lm.load(str(tiny), lazy=True)[0]
    before = flat(model)
    kinds = mlx_lm_quant.in_float32(lambda m, _: {p.dtype for p in flat(m).values()})(model, 0)
    assert mx.float32 in kinds
    after = flat(model)
    assert all(after[path].dtype == value.dtype for path, value in before.items())
    assert all(mx.array_equal(after[path], value) for path, value in before.items())


def test_the_plain_sweep_measures_each_candidate_alone(tiny):
    model, tokenizer = mlx_lm.load(str(tiny))[:2]
    text = tiny.parent / "calibration.jsonl"
    request = weights.Request(effort="plan", bits=(2, 4), group_sizes=(64,), calibration=text)
    problem = weights.calibrated(model, tokenizer, request)
    data = problem.calibration
    # With a single window the held-out one is the measured one.
    problem = replace(
        problem,
        tensors=problem.tensors[:2],
        calibration=replace(data, tokens=data.tokens[:1]),
    )
    for path, costs in sweep.plain(problem).items():
        choices = [{path: precision} for precision in costs]
        assert list(costs.values()) == pytest.approx(end_to_end(problem, choices), rel=1e-4)


def test_times_are_compared_by_their_targets():
    def measured(seconds, **more):
        process = {"resident_gib": 0.5}
        return {
            **{"seconds": seconds, "processor": 2 * seconds, "contended": False},
            **{"process": process, "windows": 16, **more},
        }

    found = {
        "taylor": measured(2.0, kl={"4": 0.11}),
        "kl": measured(10.0, kl={"4": 0.1}),
        "mlx-optiq": measured(100.0),
    }
    printed = sensitivity.lines(found)
    assert "kl / taylor: 5.0 x, 5.0 x by processor (target 5 x)" in printed
    assert "mlx-optiq / kl: 10.0 x, 10.0 x by processor (target 10 x)" in printed
    assert not any(line.startswith("plain") for line in printed)
    assert "plans at 4: KL 0.11000 with taylor, 0.10000 with kl (1.100 x" in printed[-1]


def test_growth_is_read_off_three_sizes():
    sizes = [25e6, 100e6, 400e6]
    assert scaling.exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert scaling.line(sizes, [2 + size / 1e8 for size in sizes])(9e9) == pytest.approx(92)


def test_generated_models_load_and_keep_the_embedding_in_proportion(tiny, tmp_path):
    for width, layers in ((128, 12), (256, 20)):
        rows_of = scaling.vocabulary(width, layers)
        out = tmp_path / f"{width}"
        count = generated.write(out, tiny, width, layers, rows_of)
        model = mlx_lm.load(str(out), lazy=True)[0]
        found = flat(model)
        assert sum(p.size for p in found.values()) == count
        assert rows_of * width / count == pytest.approx(scaling.SHARE, abs=0.05)
        assert found["model.embed_tokens.weight"].dtype == mx.bfloat16
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 20


def test_windows_are_those_of_the_package(tiny, tmp_path, run):
    script = Path(__file__).parent / "benchmarks" / "weights" / "rivals" / "windows.py"
    out = tmp_path / "windows.npz"
    run(
        "python", script, tiny, tiny.parent / "calibration.jsonl", out, "--windows", "4", check=True
    )
    found = np.load(out)
    assert found["planning"].shape == (4, 256)
    assert found["measured"].shape == (3, 256)
    assert len(found["refining"]) >= 4
    assert math.prod(found["planning"].shape) == 1024
