"""Rich tables of continual learning: a row per method and control."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clients.cli.tables import plain_table
from probe.continual_summary import summarise_continual
from probe.continual_text import (
    accuracy_text,
    correlation_text,
    edge_titles,
    stretch_words,
    summary_sentences,
)
from probe.result_continual import ContinualUnitResult
from probe.result_curves import ContinualSummary, LearningCurve, StretchSummary

_MAX_NAME = 18  # of a method or control, folded beyond it


def continual_report(results: Sequence[ContinualUnitResult]) -> RenderableType:
    """Accuracy of the first, the last and all tasks over seeds, and what predicts it.

    Args:
        results: At least one.
    """
    summary = summarise_continual(results)
    assert summary is not None
    shown = Text("accuracy of a task, mean ± standard error over seeds", style="dim")
    return Group(shown, _table(summary), *(Text(s) for s in summary_sentences(summary)))


def _table(summary: ContinualSummary) -> Table:
    table = plain_table()
    for name in ("method", "control"):
        table.add_column(name, overflow="fold", max_width=_MAX_NAME)
    table.add_column("runs", justify="right")
    for name in (*edge_titles(summary), "all"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("predicted r", justify="right")
    for curve in summary.curves:
        lost = f" (-{curve.num_diverged})" if curve.num_diverged else ""
        table.add_row(
            Text(curve.method),
            Text(curve.control),
            Text(f"{curve.num_runs}{lost}", style="yellow" if lost else ""),
            accuracy_text(curve.first),
            Text(accuracy_text(curve.last), style=_direction(curve)),
            accuracy_text(curve.accuracy),
            correlation_text(curve.correlations["combined"]),
        )
    return table


def _direction(curve: LearningCurve) -> str:
    """Red where the last tasks were learned worse than the first, blue where better.

    By more than two standard errors of the difference.
    """
    first, last = curve.first, curve.last
    if first.mean is None or last.mean is None:
        return ""
    error = ((first.standard_error or 0.0) ** 2 + (last.standard_error or 0.0) ** 2) ** 0.5
    if abs(last.mean - first.mean) <= 2 * error:
        return ""
    return "red" if last.mean < first.mean else "blue"


def stretch_text(summary: StretchSummary) -> Text:
    """A finished unit in one line."""
    return Text(stretch_words(summary), style="yellow" if summary.num_diverged else "")
