"""What is kept of a task: means over steps, medians over measurements, shares of violations."""

import math

import pytest
import torch

from probe.continual.course import TaskCourse
from probe.continual.signals import Measurement
from probe.result_continual import LAYER_SIGNALS, RUN_SIGNALS


def measurement(value: float, violations=((0, 0, 0), (0, 0, 0))) -> Measurement:
    """Two runs, two layers and the network; run 1 has ten times the value of run 0."""
    both = torch.tensor([value, 10 * value])
    return Measurement(
        layers={name: both.unsqueeze(1).repeat(1, 3) for name in LAYER_SIGNALS},
        runs={name: both for name in RUN_SIGNALS if name not in ("accuracy", "loss")},
        violations=torch.tensor(violations, dtype=torch.bool),
    )


def add_step(course: TaskCourse, losses, correct, size=10) -> None:
    course.sums += torch.tensor([correct, losses], dtype=torch.float64)
    course.count_step(size)


def course_of(num_steps: int, num_windows: int) -> TaskCourse:
    return TaskCourse(3, num_steps, num_windows, 2, 2, torch.ones(2, 2, dtype=torch.float64))


def test_windows_end_as_evenly_as_steps_allow():
    ends = []
    course = course_of(7, 3)
    for step in range(1, 8):
        add_step(course, [1.0, 1.0], [1, 1])
        if step == course.next_end:
            ends.append(step)
            course.end_window()
            if step == 7:
                break
    assert ends == [3, 5, 7]  # ceil(7 / 3), ceil(14 / 3), 7


def test_accuracy_and_loss_are_means_over_images():
    course = course_of(2, 1)
    add_step(course, [10.0, 20.0], [10, 0], size=10)
    add_step(course, [8.0, 1.0], [0, 2], size=2)
    course.end_window()
    first, second = course.results([(0.5, 0.25), (0.75, 0.125)])
    assert first.task == 3
    assert first.accuracy == pytest.approx(10 / 12)
    assert second.accuracy == pytest.approx(2 / 12)
    assert (first.loss, second.loss) == (18 / 12, 21 / 12)
    assert (first.accuracy_end, first.loss_end) == (0.5, 0.25)
    assert first.outcome == "finished"
    assert first.violation_share is None  # nothing was measured
    assert first.windows.runs["hessian_rank"] == [None]


def test_signals_are_medians_over_the_windows_measurements():
    course = course_of(2, 2)
    for values in ([1.0, 5.0, 2.0], [7.0]):
        add_step(course, [1.0, 1.0], [1, 1])
        for value in values:
            course.add_measurement(measurement(value))
        course.end_window()
    first, second = course.results([(1.0, 0.0)] * 2)
    assert first.windows.last_step == [1, 2]
    assert first.windows.layers["volatility"] == [[2.0, 7.0]] * 3
    assert second.windows.runs["dead_units"] == [20.0, 70.0]


def test_what_is_not_a_number_is_none_and_does_not_move_the_median():
    course = course_of(1, 1)
    add_step(course, [1.0, 1.0], [1, 1])
    for value in (math.nan, 3.0, math.nan):
        course.add_measurement(measurement(value))
    course.end_window()
    assert course.results([(1.0, 0.0)] * 2)[0].windows.layers["sharpness"] == [[3.0]] * 3

    course = course_of(1, 1)
    add_step(course, [1.0, 1.0], [1, 1])
    course.add_measurement(measurement(math.inf))
    course.end_window()
    assert course.results([(1.0, 0.0)] * 2)[0].windows.layers["bound_gradient"] == [[None]] * 3


def test_violations_are_shares_of_all_measurements():
    course = course_of(2, 2)
    for violations in (((1, 0, 0), (0, 0, 1)), ((1, 1, 0), (0, 0, 0))):
        add_step(course, [1.0, 1.0], [1, 1])
        course.add_measurement(measurement(1.0, violations))
        course.end_window()
    first, second = course.results([(1.0, 0.0)] * 2)
    assert first.violation_share == {"gradient": 1.0, "curvature": 0.5, "combined": 0.0}
    assert second.violation_share == {"gradient": 0.0, "curvature": 0.0, "combined": 0.5}


def test_a_share_of_violations_is_not_rounded_to_float32():
    course = course_of(1, 1)
    add_step(course, [1.0, 1.0], [1, 1])
    for violation in (1, 0, 0):
        course.add_measurement(measurement(1.0, ((violation, 0, 0), (0, 0, 0))))
    course.end_window()
    assert course.results([(1.0, 0.0)] * 2)[0].violation_share["gradient"] == 1 / 3


@pytest.mark.parametrize("where", ["steps", "end"])
def test_a_run_whose_loss_is_not_finite_has_diverged_and_its_neighbour_has_not(where):
    course = course_of(2, 2)
    for _ in range(2):
        add_step(course, [math.nan if where == "steps" else 1.0, 1.0], [1, 1])
        course.add_measurement(measurement(1.0))
        course.end_window()
    ends = [(0.1, math.inf if where == "end" else 1.0), (0.1, 1.0)]
    first, second = course.results(ends)
    assert first.outcome == "diverged"
    values = (first.accuracy, first.accuracy_end, first.loss, first.loss_end)
    assert values == (None,) * 4
    assert first.violation_share is None
    assert second.outcome == "finished"
    assert second.violation_share is not None
