"""What the runs of continual learning come to, in words, for tables and pages (torch-free)."""

from probe.continual_summary import BOUNDS
from probe.result_curves import (
    ContinualSummary,
    Correlation,
    LearningCurve,
    MeanOverRuns,
    StretchSummary,
)

_MOST_NAMED = 3  # curves of one line


def accuracy_text(over: MeanOverRuns) -> str:
    """`0.812 ±0.012`: the mean with its standard error over runs; a dash without a run."""
    if over.mean is None:
        return "-"
    error = over.standard_error
    return f"{over.mean:.3f}" + ("" if error is None else f" ±{error:.2g}")


def correlation_text(correlation: Correlation) -> str:
    """Pearson's coefficient; a dash where it is not defined."""
    return "-" if correlation.pearson is None else f"{correlation.pearson:.2f}"


def edge_titles(summary: ContinualSummary) -> tuple[str, str]:
    """Titles of the columns of the first and the last tasks."""
    count = summary.num_edge_tasks
    return (f"first {count}", f"last {count}") if count > 1 else ("first", "last")


def summary_sentences(summary: ContinualSummary) -> list[str]:
    """Who diverged, what is not finished yet, and how well each bound predicts the accuracy."""
    sentences = [_diverged(curve) for curve in summary.curves if curve.num_diverged]
    behind = [curve for curve in summary.curves if curve.num_diverged < curve.num_runs]
    least = min((curve.num_tasks for curve in behind), default=summary.num_tasks)
    if least < summary.num_tasks:
        sentences.append(
            f"not finished: {least} of {summary.num_tasks} tasks of every run so far, and the last "
            "tasks are the last of those"
        )
    told = [
        f"{bound} {correlation_text(correlation)} ({_spearman(correlation)})"
        for bound in BOUNDS
        if (correlation := summary.correlations[bound]).pearson is not None
    ]
    if told:
        points = max(correlation.num_points for correlation in summary.correlations.values())
        sentences.append(
            f"correlation of predicted trainability with accuracy over {points:,} tasks of all "
            f"runs, by bound: {', '.join(told)}; in brackets that of ranks"
        )
    else:
        sentences.append("correlation of predicted trainability with accuracy: not defined")
    return sentences


def stretch_words(summary: StretchSummary) -> str:
    """One unit in a line: mean accuracy over its tasks, per method and control."""
    ranked = sorted(
        (curve for curve in summary.curves if curve.mean is not None), key=lambda c: c.mean or 0.0
    )
    if len(ranked) > _MOST_NAMED:
        low, high = ranked[0], ranked[-1]
        named = [
            f"{low.mean:.3f} ({low.method} / {low.control}) to {high.mean:.3f} "
            f"({high.method} / {high.control})"
        ]
    else:
        known = [curve for curve in summary.curves if curve.mean is not None]
        named = [f"{curve.method} / {curve.control} {curve.mean:.3f}" for curve in known]
    text = f"{summary.num_runs} runs, accuracy " + (", ".join(named) or "of none")
    return text + (f", {summary.num_diverged} diverged" if summary.num_diverged else "")


def _diverged(curve: LearningCurve) -> str:
    where = ", ".join(
        f"seed {run.run.seed} in task {run.diverged_at}"
        for run in curve.runs
        if run.diverged_at is not None
    )
    return (
        f"{curve.num_diverged} of {curve.num_runs} runs of {curve.method} / {curve.control} "
        f"diverged ({where}) and are left out of the means"
    )


def _spearman(correlation: Correlation) -> str:
    return "-" if correlation.spearman is None else f"{correlation.spearman:.2f}"
