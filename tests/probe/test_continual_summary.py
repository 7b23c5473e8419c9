"""Accuracy over tasks and seeds, and correlations, from runs whose numbers are known."""

import json
import statistics

import numpy as np
import pytest
import scipy.stats

from probe.continual_summary import (
    correlation_of,
    courses_of,
    summarise_continual,
    summarise_stretch,
)
from probe.continual_text import accuracy_text, edge_titles, stretch_words, summary_sentences
from probe.plan_continual import expand_continual_units, unit_costs
from probe.result_continual import ContinualUnitResult
from probe.spec_load import parse_spec
from probe.unit_results import next_eta_init, parse_result


@pytest.fixture
def results(make_continual_results):
    """Three units of one group: tasks 0-1, 2-3 and 4; accuracies as `_known_accuracy`."""
    return make_continual_results()


def diverging(run, task):
    """0.5, but seed 1 of L2 / vanilla diverges in task 3."""
    return None if (run.method, run.control, run.seed) == ("L2", "vanilla", 1) and task > 2 else 0.5


# --- summary


def test_stretches_are_joined_by_run(results):
    courses = courses_of(reversed(results))  # in whatever order they came
    labels = [run.label for run in courses]
    assert labels[:3] == [
        "L2 / vanilla / seed 0",
        "L2 / vanilla / seed 1",
        "L2 / scheduler / seed 0",
    ]
    assert len(labels) == 8
    assert all([task.task for task in tasks] == [0, 1, 2, 3, 4] for tasks in courses.values())


def test_accuracies_are_means_over_seeds(results):
    summary = summarise_continual(results)
    assert [(c.method, c.control) for c in summary.curves] == [
        ("L2", "vanilla"), ("L2", "scheduler"), ("leaky", "vanilla"), ("leaky", "scheduler"),
    ]  # fmt: skip
    assert (summary.num_tasks, summary.num_edge_tasks, summary.num_runs) == (5, 1, 8)
    curve = summary.curves[0]
    # Seeds differ by 0.02 at every task: mean + 0.01, and a standard error of 0.01.
    assert [t.mean for t in curve.tasks] == pytest.approx([0.71 - 0.1 * t for t in range(5)])
    assert [t.standard_error for t in curve.tasks] == pytest.approx([0.01] * 5)
    assert (curve.first.mean, curve.last.mean) == pytest.approx((0.71, 0.31))
    assert (curve.accuracy.mean, curve.accuracy.standard_error) == pytest.approx((0.51, 0.01))
    assert (curve.first.num_runs, curve.num_tasks, curve.num_diverged) == (2, 5, 0)
    assert summary.curves[3].last.mean == pytest.approx(0.2 + 0.05 * 4 + 0.2 + 0.01)


def test_edges_are_a_quarter_of_the_stream_and_at_most_five_tasks(
    continual_spec, make_continual_results
):
    continual_spec["stream"]["num_tasks"] = 24
    summary = summarise_continual(make_continual_results(accuracy=lambda run, task: task / 100))
    assert summary.num_edge_tasks == 5
    assert summary.curves[0].first.mean == pytest.approx(0.02)
    assert summary.curves[0].last.mean == pytest.approx(0.21)
    assert edge_titles(summary) == ("first 5", "last 5")


def test_one_seed_has_no_standard_error(continual_spec, make_continual_results):
    continual_spec["seeds"] = [3]
    curve = summarise_continual(make_continual_results()).curves[0]
    assert curve.accuracy.num_runs == 1
    assert curve.accuracy.standard_error is None
    assert accuracy_text(curve.first) == "0.760"


def test_a_run_that_diverged_is_counted_and_left_out(make_continual_results):
    summary = summarise_continual(make_continual_results(accuracy=diverging))
    curve = summary.curves[0]
    assert (summary.num_diverged, curve.num_diverged, curve.num_runs) == (1, 1, 2)
    assert [task.num_runs for task in curve.tasks] == [1] * 5  # also where it still ran
    gone = curve.runs[1]
    assert (gone.diverged_at, gone.accuracy, gone.num_tasks) == (3, 0.5, 5)
    assert summary.correlations["combined"].num_points == 7 * 5
    assert summary_sentences(summary)[0] == (
        "1 of 2 runs of L2 / vanilla diverged (seed 1 in task 3) and are left out of the means"
    )


def test_all_runs_diverged_leave_nothing(make_continual_results):
    summary = summarise_continual(make_continual_results(accuracy=lambda run, task: None))
    assert summary.num_diverged == 8
    for curve in summary.curves:
        assert (curve.first.mean, curve.last.mean, curve.accuracy.mean) == (None, None, None)
        assert (curve.tasks, curve.num_tasks) == ([], 0)
        assert accuracy_text(curve.accuracy) == "-"
    assert "not defined" in summary_sentences(summary)[-1]


def test_an_unfinished_job_gives_what_is_there(results):
    summary = summarise_continual(results[:2])
    curve = summary.curves[0]
    assert (summary.num_tasks, curve.num_tasks) == (5, 4)
    assert curve.last.mean == pytest.approx(0.41)  # task 3, the last that there is
    assert any("not finished: 4 of 5 tasks" in s for s in summary_sentences(summary))
    assert not any("not finished" in s for s in summary_sentences(summarise_continual(results)))
    assert summarise_continual([]) is None


def test_last_tasks_are_those_all_runs_of_a_curve_have(continual_spec, make_continual_results):
    """With 3 runs a group, seed 1 of L2 / scheduler is in the second group, which is behind."""
    continual_spec["runs_per_unit"] = 3
    results = [
        r for r in make_continual_results() if "group-0" in r.unit.unit_id or r.unit.first_task == 0
    ]
    curve = summarise_continual(results).curves[1]
    assert [run.num_tasks for run in curve.runs] == [5, 2]
    assert (curve.num_tasks, len(curve.tasks)) == (2, 5)
    assert curve.last.mean == pytest.approx(0.7 - 0.1 + 0.2 + 0.01)
    assert curve.tasks[4].num_runs == 1


# --- correlations


@pytest.mark.parametrize("seed", [0, 1])
def test_correlations_are_scipys(seed):
    """Ties included: ranks to one decimal. Both in fp64, sums of 40 numbers: 1e-12."""
    draw = np.random.default_rng(seed)
    points = [(float(x), float(y)) for x, y in draw.random((40, 2)).round(1)]
    found = correlation_of(points)
    x, y = zip(*points, strict=True)
    assert found.pearson == pytest.approx(scipy.stats.pearsonr(x, y).statistic, abs=1e-12)
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)
    assert found.num_points == 40


@pytest.mark.parametrize(
    "points", [[], [(0.1, 0.2)], [(0.1, 0.2), (0.1, 0.9), (0.1, 0.3)], [(0.0, 0.7), (1.0, 0.7)]]
)
def test_a_correlation_that_does_not_exist_is_none(points):
    found = correlation_of(points)
    assert (found.num_points, found.pearson, found.spearman) == (len(points), None, None)


def test_predicted_trainability_is_one_minus_the_share(results):
    summary = summarise_continual(results)
    falling, _, rising, _ = summary.curves
    # shares: combined 0.1 task, so 1 - share falls with L2's accuracy and against leaky's
    assert falling.runs[0].correlations["combined"].pearson == pytest.approx(1.0)
    assert rising.runs[0].correlations["combined"].pearson == pytest.approx(-1.0)
    # gradient: its square, of the same order but not on a line
    assert falling.runs[0].correlations["gradient"].spearman == pytest.approx(1.0)
    assert 0.9 < falling.runs[0].correlations["gradient"].pearson < 1
    # curvature: constant
    assert falling.correlations["curvature"].pearson is None
    both = [(1 - 0.1 * t, 0.7 - 0.1 * t + 0.02 * s) for s in (0, 1) for t in range(5)]
    expected = statistics.correlation(*zip(*both, strict=True))
    assert falling.correlations["combined"].pearson == pytest.approx(expected)
    assert summary.correlations["combined"].num_points == 40


def test_tasks_without_measurements_are_no_points(make_continual_results):
    results = make_continual_results(shares=lambda run, task: None)
    assert summarise_continual(results).correlations["combined"].num_points == 0


# --- one unit, words


def test_a_unit_in_a_line(results, make_continual_results):
    stretch = summarise_stretch(results[1])
    assert (stretch.first_task, stretch.num_tasks, stretch.num_runs) == (2, 2, 8)
    found = {(c.method, c.control): c.mean for c in stretch.curves}
    assert found["L2", "vanilla"] == pytest.approx(0.46)  # tasks 2 and 3
    assert stretch_words(stretch) == (
        "8 runs, accuracy 0.335 (leaky / vanilla) to 0.660 (L2 / scheduler)"
    )
    gone = summarise_stretch(make_continual_results(accuracy=lambda run, task: None)[0])
    assert stretch_words(gone) == "8 runs, accuracy of none, 8 diverged"


def test_results_survive_json_and_hand_on_nothing(results):
    for result in results:
        found = parse_result(json.loads(result.model_dump_json()))
        assert type(found) is ContinualUnitResult
        assert found == result
        assert found.has_every_answer
        assert next_eta_init(found) == {}


def test_costs_are_runs_times_tasks_times_epochs(continual_spec):
    continual_spec["controls"][1]["epochs"] = 30  # instead of 3
    spec = parse_spec(continual_spec)
    assert unit_costs(spec, expand_continual_units(spec)) == [24, 24, 12, 240, 240, 120]
