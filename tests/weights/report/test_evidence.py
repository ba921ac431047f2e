"""The numbers behind a report."""

import dataclasses
import math

import pytest

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.weights import Precision
from mlx_optiq_ext.weights.plan_search import uniformly
from mlx_optiq_ext.weights.report import gather, uniforms
from mlx_optiq_ext.weights.report.evidence import UNIFORM_BITS
from mlx_optiq_ext.weights.sensitivity.problem import end_to_end


def test_the_uniform_packings_are_judged_end_to_end_as_the_plan_is(study, evidence):
    problem = study.problem
    assert [j.precision for j in evidence.uniforms] == [Precision(b, 64) for b in UNIFORM_BITS]
    judged = end_to_end(
        problem, [uniformly(problem.tensors, j.precision) for j in evidence.uniforms]
    )
    assert [j.kl for j in evidence.uniforms] == pytest.approx(judged)
    assert judged == sorted(judged, reverse=True)
    again = end_to_end(problem, [evidence.plan.precisions])[0]
    assert evidence.kl == pytest.approx(again)
    assert evidence.judged_on == problem.calibration.held_out.size


def test_the_common_packing_is_a_candidate_of_all_within_the_average(evidence):
    common = evidence.common
    assert common is not None
    bits = [t.stored_bits(common) for t in evidence.tensors]
    assert sum(bits) <= evidence.stored_bits
    assert all(common in t.precisions for t in evidence.tensors)


def test_a_plan_that_was_not_measured_has_no_report(study, evidence):
    with pytest.raises(InputError, match="give a budget"):
        gather(study, dataclasses.replace(evidence.plan, kl=None), "toy")
    with pytest.raises(InputError, match="give a budget"):
        gather(dataclasses.replace(study, sensitivity={}), evidence.plan, "toy")


def test_uniform_packings_fall_back_to_groups_that_fit(study):
    tensors = tuple(dataclasses.replace(t, shape=(64, 96)) for t in study.problem.tensors[:1])
    found = []

    def no_run(problem, choices):
        found.extend(choices)
        return [0.0] * len(choices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_optiq_ext.weights.report.evidence.end_to_end", no_run)
        judged = uniforms(dataclasses.replace(study.problem, tensors=tensors))
    assert {j.precision.group_size for j in judged} == {32}
    assert len(found) == len(UNIFORM_BITS)


def test_equal_quality_is_interpolated_between_the_uniform_packings(evidence):
    width = evidence.size.bits_per_weight
    points = [(width(j.stored_bits), j.kl) for j in evidence.uniforms]
    halfway = math.sqrt(points[1][1] * points[2][1])
    odd = dataclasses.replace(evidence, plan=dataclasses.replace(evidence.plan, kl=halfway))
    assert odd.equal_bpw == pytest.approx((points[1][0] + points[2][0]) / 2)
    lost = dataclasses.replace(evidence, plan=dataclasses.replace(evidence.plan, kl=1e9))
    assert lost.equal_bpw is None
