"""Runs of continual learning as lines to draw (torch-free): medians over windows and seeds."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from probe.continual_summary import courses_of, diverged_at
from probe.result_continual import ContinualUnitResult, RunTask

Line = list[dict[str, float | None]]
Values = Callable[[RunTask], Sequence[float | None]]

_MOST_POINTS = 130  # of a line: up to so many, every window is drawn, beyond it tasks
_CLIPPED = 0.05  # share of values at either end that a log axis may leave out


@dataclass(frozen=True, slots=True)
class Arm:
    """One method with one control: the tasks of every run that did not diverge."""

    method: str
    control: str
    runs: list[list[RunTask]]
    layer_names: list[str]
    num_steps_per_task: int

    @property
    def num_tasks(self) -> int:
        """Of the run that is furthest."""
        return max((len(tasks) for tasks in self.runs), default=0)


def arms_of(results: Sequence[ContinualUnitResult]) -> list[Arm]:
    """Every method and control, in the order of the spec."""
    about = {record.run: result for result in results for record in result.runs}
    courses = courses_of(results)
    arms = []
    for (method, control), group in groupby(courses, lambda run: (run.method, run.control)):
        runs = list(group)
        lasting = [courses[run] for run in runs if diverged_at(courses[run]) is None]
        result = about[runs[0]]
        arms.append(Arm(method, control, lasting, result.layer_names, result.num_steps_per_task))
    return arms


def mean_line(
    arm: Arm, series: str, value: Callable[[RunTask], float | None], every: int
) -> list[dict[str, float | str | None]]:
    """A point per drawn task: the mean over the runs that have a value."""
    found: dict[int, list[float]] = {}
    for tasks in arm.runs:
        for task in tasks:
            number = value(task)
            if task.task % every == 0 and number is not None:
                found.setdefault(task.task, []).append(number)
    return [
        {"series": series, "task": task, "value": statistics.fmean(values)}
        for task, values in sorted(found.items())
    ]


def layer_line(arm: Arm, signal: str, layer: int) -> Line:
    """A layer's signal; -1 is the whole network. Median over windows, then over runs."""

    def values(task: RunTask) -> Sequence[float | None]:
        layers = task.windows.layers.get(signal)
        return layers[layer] if layers else []

    return _line(arm, values)


def run_line(arm: Arm, signal: str) -> Line:
    """A signal of the whole run."""
    return _line(arm, lambda task: task.windows.runs.get(signal, []))


def clipped_domain(
    rows: Sequence[dict[str, float | str | None]], whole: Iterable[str]
) -> list[float] | None:
    """Limits of a log axis, or None without a positive value.

    Bounds shoot up where noise vanishes; so that the rest is seen, the smallest and largest few
    are left out, but of the series named by `what` in `whole` nothing is.
    """
    kept = set(whole)
    positive = [
        (value, row.get("what") in kept)
        for row in rows
        if isinstance(value := row["value"], int | float) and value > 0
    ]
    if not positive:
        return None
    ordered = sorted(value for value, _ in positive)
    cut = int(_CLIPPED * len(ordered))
    ends = [ordered[cut], ordered[-1 - cut], *(value for value, is_kept in positive if is_kept)]
    return [min(ends) / 1.3, max(ends) * 1.3]


def _line(arm: Arm, values: Values) -> Line:
    num_windows = max((len(values(task)) for tasks in arm.runs for task in tasks), default=0)
    if arm.num_tasks * num_windows <= _MOST_POINTS:
        return _by_window(arm, values)
    every = max(1, -(-arm.num_tasks // _MOST_POINTS))
    found: dict[float, list[float]] = {}
    for tasks in arm.runs:
        for task in tasks:
            if task.task % every == 0:
                middle = _median(values(task))
                found.setdefault(task.task, []).extend([] if middle is None else [middle])
    return [{"task": task, "value": _median(found[task])} for task in sorted(found)]


def _by_window(arm: Arm, values: Values) -> Line:
    """A task's windows lie between its number and the next."""
    found: dict[float, list[float | None]] = {}
    for tasks in arm.runs:
        for task in tasks:
            steps, is_measured = task.windows.last_step, _measured(task)
            for step, value, there in zip(steps, values(task), is_measured, strict=False):
                if there:
                    place = task.task + step / arm.num_steps_per_task
                    found.setdefault(place, []).append(value)
    return [{"task": place, "value": _median(found[place])} for place in sorted(found)]


def _measured(task: RunTask) -> list[bool]:
    """Per window, whether a measurement fell into it: then there is a learning rate.

    A value that is missing there does not exist, and the line has a gap; a window without a
    measurement makes none.
    """
    rates = task.windows.layers.get("learning_rate")
    return [rate is not None for rate in rates[-1]] if rates else []


def _median(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None
