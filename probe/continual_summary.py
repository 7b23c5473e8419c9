"""Accuracy over tasks and seeds, and how well bounds on the step size predict it (torch-free)."""

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import get_args

from probe.result import RunRef
from probe.result_continual import Bound, ContinualUnitResult, RunTask
from probe.result_curves import (
    ContinualSummary,
    Correlation,
    LearningCurve,
    MeanOverRuns,
    RunCurve,
    StretchAccuracy,
    StretchSummary,
    TaskAccuracy,
)

_MOST_EDGE_TASKS = 5
_EDGE_SHARE = 4  # first and last tasks are at most this part of the stream each
BOUNDS: tuple[Bound, ...] = get_args(Bound)

Courses = dict[RunRef, list[RunTask]]
Points = list[tuple[float, float]]


def courses_of(results: Iterable[ContinualUnitResult]) -> Courses:
    """Every run's tasks in order, its stretches joined; runs in the order of the spec.

    Args:
        results: Of one job; what is not finished is missing.
    """
    found: Courses = {}
    spec = None
    for result in results:
        spec = spec or result.spec
        for record in result.runs:
            found.setdefault(record.run, []).extend(record.tasks)
    if spec is None:
        return {}
    methods = [method["name"] for method in spec["methods"]]
    controls = [control["name"] for control in spec["controls"]]

    def place(run: RunRef) -> tuple[int, int, int]:
        seed = spec["seeds"].index(run.seed)
        return methods.index(run.method), controls.index(run.control), seed

    return {run: sorted(found[run], key=lambda t: t.task) for run in sorted(found, key=place)}


def summarise_continual(results: Iterable[ContinualUnitResult]) -> ContinualSummary | None:
    """What a job's runs come to; None without a result.

    Args:
        results: Of one job, in unit order; a job that is not finished gives what is there.
    """
    units = list(results)
    if not units:
        return None
    courses = courses_of(units)
    num_tasks = int(units[0].spec["stream"]["num_tasks"])
    num_edge = max(1, min(_MOST_EDGE_TASKS, num_tasks // _EDGE_SHARE))
    by_curve = groupby(courses, lambda run: (run.method, run.control))
    curves = [_curve([(run, courses[run]) for run in runs], num_edge) for _, runs in by_curve]
    lasting = [tasks for tasks in courses.values() if diverged_at(tasks) is None]
    return ContinualSummary(
        num_tasks=num_tasks,
        num_edge_tasks=num_edge,
        num_runs=len(courses),
        num_diverged=len(courses) - len(lasting),
        curves=curves,
        correlations=_correlations(lasting),
    )


def summarise_stretch(result: ContinualUnitResult) -> StretchSummary:
    """One unit in a few numbers."""
    records = sorted(result.runs, key=lambda record: (record.run.method, record.run.control))
    curves = []
    for (method, control), group in groupby(records, lambda r: (r.run.method, r.run.control)):
        runs = [record.tasks for record in group]
        lasting = [tasks for tasks in runs if diverged_at(tasks) is None]
        mean = _mean_over_runs([_mean_accuracy(tasks) for tasks in lasting])
        curves.append(
            StretchAccuracy(
                method=method,
                control=control,
                num_diverged=len(runs) - len(lasting),
                **mean.model_dump(),
            )
        )
    return StretchSummary(
        first_task=result.unit.first_task or 0,
        num_tasks=result.unit.num_tasks or 0,
        num_runs=len(records),
        num_diverged=sum(curve.num_diverged for curve in curves),
        curves=curves,
    )


def diverged_at(tasks: Iterable[RunTask]) -> int | None:
    """The first task that diverged; None: none did."""
    return next((task.task for task in tasks if task.outcome == "diverged"), None)


def correlation_of(points: Points) -> Correlation:
    """Pearson's and Spearman's coefficient; None where they are undefined.

    Args:
        points: (predicted trainability, accuracy).
    """
    predicted, accuracy = [x for x, _ in points], [y for _, y in points]
    return Correlation(
        num_points=len(points),
        pearson=_pearson(predicted, accuracy),
        spearman=_pearson(_ranks(predicted), _ranks(accuracy)),
    )


def _curve(runs: list[tuple[RunRef, list[RunTask]]], num_edge: int) -> LearningCurve:
    lasting = [tasks for _, tasks in runs if diverged_at(tasks) is None]
    numbers = [{task.task for task in tasks} for tasks in lasting]
    common = sorted(set.intersection(*numbers)) if numbers else []
    first_run = runs[0][0]
    return LearningCurve(
        method=first_run.method,
        control=first_run.control,
        num_runs=len(runs),
        num_diverged=len(runs) - len(lasting),
        num_tasks=len(common),
        tasks=[_task_accuracy(task, lasting) for task in sorted(set().union(*numbers))],
        first=_over_runs(lasting, [task for task in common if task < num_edge]),
        last=_over_runs(lasting, common[-num_edge:]),
        accuracy=_over_runs(lasting, common),
        correlations=_correlations(lasting),
        runs=[_run_curve(run, tasks) for run, tasks in runs],
    )


def _run_curve(run: RunRef, tasks: list[RunTask]) -> RunCurve:
    before = [task for task in tasks if task.outcome == "finished"]
    return RunCurve(
        run=run,
        num_tasks=len(tasks),
        diverged_at=diverged_at(tasks),
        accuracy=_mean_accuracy(before),
        correlations=_correlations([before]),
    )


def _task_accuracy(number: int, runs: list[list[RunTask]]) -> TaskAccuracy:
    values = [task.accuracy for tasks in runs for task in tasks if task.task == number]
    return TaskAccuracy(task=number, **_mean_over_runs(values).model_dump())


def _over_runs(runs: list[list[RunTask]], numbers: Sequence[int]) -> MeanOverRuns:
    chosen = set(numbers)
    return _mean_over_runs(
        _mean_accuracy([task for task in tasks if task.task in chosen]) for tasks in runs
    )


def _mean_accuracy(tasks: Sequence[RunTask]) -> float | None:
    values = [task.accuracy for task in tasks if task.accuracy is not None]
    return statistics.fmean(values) if values else None


def _mean_over_runs(values: Iterable[float | None]) -> MeanOverRuns:
    found = [value for value in values if value is not None]
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
    return MeanOverRuns(
        mean=statistics.fmean(found) if found else None,
        standard_error=error,
        num_runs=len(found),
    )


def _correlations(runs: Iterable[Iterable[RunTask]]) -> dict[Bound, Correlation]:
    tasks = [task for run in runs for task in run]
    return {bound: correlation_of(_points(tasks, bound)) for bound in BOUNDS}


def _points(tasks: Iterable[RunTask], bound: Bound) -> Points:
    """(1 - violation share, accuracy) of the tasks that have both."""
    return [
        (1 - task.violation_share[bound], task.accuracy)
        for task in tasks
        if task.accuracy is not None and task.violation_share and bound in task.violation_share
    ]


def _pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    if len(x) < 2 or min(x) == max(x) or min(y) == max(y):
        return None
    try:
        return statistics.correlation(x, y)
    except statistics.StatisticsError:  # so nearly constant that the squares are zero
        return None


def _ranks(values: Sequence[float]) -> list[float]:
    """1 for the smallest; equal values share the mean of their ranks."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranks = [0.0] * len(values)
    done = 0
    for _, equal in groupby(order, lambda i: values[i]):
        places = list(equal)
        for place in places:
            ranks[place] = done + (len(places) + 1) / 2
        done += len(places)
    return ranks
