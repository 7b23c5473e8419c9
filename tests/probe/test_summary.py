"""Summaries of repeats against their formulas."""

import math

import pytest

from probe.summary import summarise


def test_mean_standard_error_and_bracket_are_over_the_converged_repeats(make_unit_result):
    etas = {"update": [0.1, "no_crossing", 0.2, 0.4], "held_out": [1.0]}
    measurements = make_unit_result(etas=etas).measurements
    found = summarise(measurements, "update")
    assert (found.num_repeats, found.num_converged) == (4, 3)
    assert found.lambda_c_values == [20.0, None, 10.0, 5.0]
    assert found.lambda_c_mean == pytest.approx(35 / 3)
    deviations = [value - 35 / 3 for value in (20, 10, 5)]
    spread = math.sqrt(sum(d * d for d in deviations) / 2)
    assert found.lambda_c_standard_error == pytest.approx(spread / math.sqrt(3))
    ours = [m for m in measurements if m.loss_batch == "update" and m.lambda_c]
    assert found.lambda_c_lower == 2 / max(m.eta_upper for m in ours)
    assert found.lambda_c_upper == 2 / min(m.eta_lower for m in ours)
    assert found.outcomes == {"converged": 3, "no_crossing": 1}
    assert found.num_forward_passes == 16
    assert found.loss_mean == 4.0


def test_one_repeat_has_no_standard_error(make_unit_result):
    found = summarise(make_unit_result(etas={"held_out": [0.5]}).measurements, "held_out")
    assert (found.lambda_c_mean, found.lambda_c_standard_error) == (4.0, None)


def test_without_an_answer_there_is_no_number(make_unit_result):
    etas = {"update": ["no_crossing", "not_a_descent_direction"]}
    found = summarise(make_unit_result(etas=etas).measurements, "update")
    assert found.num_converged == 0
    assert found.lambda_c_mean is found.lambda_c_lower is found.lambda_c_upper is None
    assert found.lambda_c_values == [None, None]
    assert found.outcomes == {"no_crossing": 1, "not_a_descent_direction": 1}
