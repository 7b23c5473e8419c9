"""Rich tables of a training grid: a row per run, a column per task, loss and accuracy."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clients.cli.tables import plain_table
from probe.result_train import MixTrainUnitResult, TaskChange, TrainTable, TrainUnitSummary
from probe.train_summary import summarise_training
from probe.train_text import change_text, harmless_sentences, runs_of, tasks_of

_MAX_NAME = 20  # of a task, folded beyond it
_CAPTIONS = {
    "loss": "change of the loss, nats per token (below 0: better)",
    "accuracy": "change of the accuracy, % points (above 0: better)",
}


def training_report(results: Sequence[MixTrainUnitResult]) -> RenderableType:
    """Both tables of every checkpoint, and how far each ratio went unharmed.

    Args:
        results: At least one.
    """
    parts: list[RenderableType] = []
    for table in summarise_training(results):
        parts += [""] if parts else []
        parts.append(Text(table.checkpoint, style="bold"))
        for metric in _CAPTIONS:
            parts += [Text(_CAPTIONS[metric], style="dim"), _table(table, metric)]
        parts += [Text(sentence) for sentence in harmless_sentences(table)]
    return Group(*parts)


def _table(table: TrainTable, metric: str) -> Table:
    shown = plain_table()
    shown.add_column(Text(table.varied), justify="right", overflow="fold", max_width=_MAX_NAME)
    shown.add_column("lr", justify="right")
    for task in tasks_of(table):
        shown.add_column(Text(task), justify="right", overflow="fold", max_width=_MAX_NAME)
    for ratio, rate, cells in runs_of(table):
        shown.add_row(
            f"{ratio:g}", f"{rate:g}", *(_change_cell(cell.change, metric) for cell in cells)
        )
    return shown


def _change_cell(change: TaskChange, metric: str) -> Text:
    """Red where it is worse and blue where it is better by more than two standard errors."""
    value = change.loss_change if metric == "loss" else change.accuracy_change
    error = (
        change.loss_change_standard_error
        if metric == "loss"
        else change.accuracy_change_standard_error
    )
    text = change_text(change, metric)
    if value is None:
        return Text(text, style="yellow")
    if error is None or abs(value) <= 2 * error:
        return Text(text)
    is_better = value < 0 if metric == "loss" else value > 0
    return Text(text, style="blue" if is_better else "red")


def run_text(summary: TrainUnitSummary) -> Text:
    """A finished run in one line: the change of every task's loss."""
    text = Text(f"ratio {summary.ratio:g}, lr {summary.learning_rate:g}: ")
    if summary.outcome == "diverged":
        return text.append(f"diverged after {summary.num_steps} steps", style="yellow")
    for position, change in enumerate(summary.tasks):
        text.append(", " if position else "").append(f"{change.task} ")
        text.append_text(_change_cell(change, "loss"))
    return text
