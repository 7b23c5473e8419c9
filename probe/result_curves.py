"""What the runs of a continual-learning job come to (torch-free): accuracy over tasks, predictions.

Everything is over seeds, for each method and control. A run in which a loss was NaN or infinite
has no accuracy from there on: it is counted, and left out of every mean and correlation.
"""

from pydantic import Field

from probe.result import ResultModel, RunRef
from probe.result_continual import Bound


class MeanOverRuns(ResultModel):
    """A mean over runs, one value each."""

    mean: float | None = Field(description="None: there is no run to take it over.")
    standard_error: float | None = Field(description="Over the runs; None below two.")
    num_runs: int


class TaskAccuracy(MeanOverRuns):
    """Accuracy while one task was learned, over the runs that have it."""

    task: int


class Correlation(ResultModel):
    """Of predicted trainability, 1 - violation share, with accuracy: a point per run and task."""

    num_points: int
    pearson: float | None = Field(
        description="None: fewer than two points, or one of the two is constant."
    )
    spearman: float | None = Field(description="The same of ranks, ties at their mean rank.")


class RunCurve(ResultModel):
    """One run over all its stretches so far."""

    run: RunRef
    num_tasks: int = Field(description="With a result.")
    diverged_at: int | None = Field(description="First task, from 0, that diverged; None: none.")
    accuracy: float | None = Field(description="Mean over the tasks before it diverged.")
    correlations: dict[Bound, Correlation]


class LearningCurve(ResultModel):
    """One method with one control, over seeds."""

    method: str
    control: str
    num_runs: int
    num_diverged: int = Field(description="Runs left out of all that follows but `runs`.")
    num_tasks: int = Field(description="That every run counted here has finished.")
    tasks: list[TaskAccuracy]
    first: MeanOverRuns = Field(description="Each run's mean over the first `num_edge_tasks`.")
    last: MeanOverRuns = Field(
        description="Each run's mean over the last `num_edge_tasks` that all have finished."
    )
    accuracy: MeanOverRuns = Field(description="Each run's mean over the tasks all have finished.")
    correlations: dict[Bound, Correlation] = Field(description="Over all its runs and tasks.")
    runs: list[RunCurve]


class ContinualSummary(ResultModel):
    """A job's runs, as far as they have come."""

    num_tasks: int = Field(description="Of the stream.")
    num_edge_tasks: int = Field(description="How many the first and the last tasks are.")
    num_runs: int
    num_diverged: int
    curves: list[LearningCurve] = Field(description="By method, then control, as in the spec.")
    correlations: dict[Bound, Correlation] = Field(description="Over all runs and tasks.")


class StretchAccuracy(MeanOverRuns):
    """Mean accuracy over a stretch of tasks, of one method and control."""

    method: str
    control: str
    num_diverged: int = Field(description="Runs left out.")


class StretchSummary(ResultModel):
    """One unit in a few numbers, for a line."""

    first_task: int
    num_tasks: int
    num_runs: int
    num_diverged: int
    curves: list[StretchAccuracy]
