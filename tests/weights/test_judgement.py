import json

import mlx_lm
import numpy as np
import pytest
from toy_fixtures import quiet

from mlx_optiq_ext.weights import Precision, plan_folder, search, study_model
from mlx_optiq_ext.weights.judgement import Judged, Judgements, Verdict
from mlx_optiq_ext.weights.plan_search import chosen

A, B, C = ({"layer": Precision(bits, 64)} for bits in (2, 3, 4))


def judged(plan, pieces, *, name="plan", ended=False):
    return Judged(name, plan, Verdict(float(np.mean(pieces)), tuple(pieces)), ended)


def test_a_plan_must_beat_the_best_uniform_quantization_beyond_noise():
    plain = judged(B, [1.0, 2.0, 3.0, 4.0])
    little = judged(A, [0.9, 2.1, 2.5, 4.1])
    clearly = judged(C, [0.8, 1.7, 2.7, 3.7])
    assert little.verdict.kl < plain.verdict.kl
    assert chosen([little, plain], [B]) is plain
    assert chosen([clearly, plain], [B]) is clearly
    assert chosen([little], [B]) is little  # no uniform quantization fits
    # A smaller budget has ended with it: its result must be reached.
    ended = judged(A, [0.9, 2.1, 2.5, 4.1], ended=True)
    assert chosen([ended, plain], [B]) is ended


def test_what_overflows_loses_to_everything():
    overflown = Verdict.of(np.array([[np.nan, 1.0]], np.float32))
    fine = Verdict.of(np.full((2, 128), 9.0, np.float32))
    assert overflown.kl == float("inf")
    assert len(fine.pieces) == 4
    assert fine.beats(overflown)
    assert not overflown.beats(fine)
    assert not fine.beats(fine)


def test_a_piece_of_hard_text_does_not_drown_the_others():
    other = Verdict(0.325, (0.02, 0.03, 0.02, 0.03, 0.35, 1.5))
    better = Verdict(0.323, (0.002, 0.003, 0.002, 0.003, 0.32, 1.6))
    assert better.beats(other)
    assert not Verdict(0.33, better.pieces).beats(other)


@pytest.fixture
def study(toy, text):
    """Opens the toy model's study, as a process of its own would."""

    def study(**settings):
        model, tokenizer = mlx_lm.load(str(toy))[:2]
        return study_model(
            model, tokenizer, quiet(calibration=text, **settings), digest="the model"
        )

    return study


def test_a_larger_budget_takes_what_was_judged_for_a_smaller_one(study):
    def lucky(_, plans):  # the first plan is the best there can be
        return [np.full((1, 128), float(n)) for n in range(len(plans))]

    def poor(_, plans):
        return [np.full((1, 128), 1.0 + n) for n in range(len(plans))]

    first = search(study(), 3.5, measure=lucky)
    then = search(study(), 5.0, measure=poor)
    assert then.precisions == first.precisions
    assert (then.kl, first.kl) == (0.0, 0.0)
    assert then.variant == "allocated, for a budget of 3.5"
    assert then.achieved_bpw <= 3.5
    # One that it does not fit, or that may not choose its bits, does not get it.
    assert search(study(), 3.0, measure=poor).precisions != first.precisions
    wide = search(study(bits=(4, 8)), 5.0, measure=poor)
    assert {p.bits for p in wide.precisions.values()} <= {4, 8}


def test_no_plan_is_judged_twice(study):
    first = search(study(), 4.5)
    again = search(study(), 4.5, measure=lambda _, plans: pytest.fail("judged again"))
    assert (again.precisions, again.kl) == (first.precisions, first.kl)
    assert again.variant == first.variant


@pytest.mark.parametrize(
    "damage",
    [
        {"plan": "4/64/affine"},
        {"plan": "x"},
        {"plan": 4},
        {"kl": -1.0},
        {"pieces": ["0"]},
        {"pieces": []},
        {"name": None},
    ],
)
def test_a_record_that_is_none_is_judged_again(study, damage):
    from mlx_optiq_ext import files

    search(study(), 4.5)
    (path,) = (files.cache_dir() / "judged").glob("*.jsonl")
    records = list(files.read_records(path))
    path.unlink()
    files.append_records(path, [{**record, **damage} for record in records])
    known = Judgements(study().problem)
    assert not list(known)
    assert search(study(), 4.5).achieved_bpw <= 4.5
    assert json.loads(path.read_text().splitlines()[-1])["chosen"] is True


def test_budgets_in_any_order_never_end_worse_than_smaller_ones(toy, text):
    ends = {}
    for budget in (3.0, 4.5, 3.6, 5.5, 4.0):
        ends[budget] = plan_folder(str(toy), quiet(budget=budget, calibration=text)).kl
        smaller = [kl for other, kl in ends.items() if other < budget]
        assert all(ends[budget] <= kl for kl in smaller)
