"""Rich tables of a mix scan: a row per ratio, a column per task, and what it comes to.

As in `clients.cli.tables`, what users have named is wrapped in `Text`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clients.cli.continual_tables import continual_report
from clients.cli.tables import number, plain_table, results_table, spread
from clients.cli.train_tables import training_report
from probe.mix_summary import summarise_scans
from probe.mix_text import (
    crossing_sentences,
    grid,
    outcome_words,
    sweet_spot_sentence,
    tasks_of,
)
from probe.reports import continual_results, mix_results, series_results, train_results
from probe.result_mix import MixPoint, MixScan, MixUnitSummary
from probe.unit_results import AnyUnitResult

_GAP = 2  # blanks between columns
_MAX_NAME = 20  # of a task, folded beyond it


def report(results: Sequence[AnyUnitResult], *, width: int) -> RenderableType:
    """The table or tables of a job's finished units, whatever its kind.

    Args:
        results: At least one.
        width: Columns of the terminal: a scan of many tasks is cut into tables side by side in
            meaning, one below the other on the screen.
    """
    learned = continual_results(results)
    if learned:
        return continual_report(learned)
    runs = train_results(results)
    if runs:
        return training_report(runs)
    scans = summarise_scans(mix_results(results))
    if not scans:
        return results_table(series_results(results))
    parts: list[RenderableType] = []
    for index, scan in enumerate(scans):
        parts += [""] if index else []
        parts += [Text(scan.checkpoint, style="bold"), *_scan_tables(scan, width)]
        style = "" if scan.sweet_spot else "yellow"
        parts.append(Text(sweet_spot_sentence(scan), style=style))
        parts += [Text(sentence) for sentence in crossing_sentences(scan.crossings)]
    return Group(*parts)


def _scan_tables(scan: MixScan, width: int) -> Iterator[Table]:
    """As many tables as it takes, each with as many tasks as there is room for."""
    first = max(len(scan.varied[:_MAX_NAME]), *(len(f"{ratio:.4g} *") for ratio, _ in grid(scan)))
    columns = [_column(scan, index, task) for index, task in enumerate(tasks_of(scan))]
    taken: list[_Column] = []
    left = width - first
    for column in columns:
        if taken and _GAP + column.width > left:
            yield _scan_table(scan, taken)
            taken, left = [], width - first
        taken.append(column)
        left -= _GAP + column.width
    yield _scan_table(scan, taken)


@dataclass(frozen=True, slots=True)
class _Column:
    """One task: its name and a cell per ratio."""

    name: str
    cells: list[Text]
    width: int


def _column(scan: MixScan, index: int, task: str) -> _Column:
    cells = [point_text(points[index]) for _, points in grid(scan)]
    return _Column(task, cells, max(min(len(task), _MAX_NAME), *(len(cell) for cell in cells)))


def _scan_table(scan: MixScan, columns: Sequence[_Column]) -> Table:
    """One row per ratio; the sweet spot's has a star."""
    table = plain_table()
    table.add_column(Text(scan.varied), justify="right", overflow="fold", max_width=_MAX_NAME)
    for column in columns:
        table.add_column(
            Text(column.name), justify="right", overflow="fold", max_width=column.width
        )
    for row, (ratio, _) in enumerate(grid(scan)):
        is_best = scan.sweet_spot is not None and scan.sweet_spot.ratio == ratio
        table.add_row(
            Text(f"{ratio:.4g}{' *' if is_best else ''}", style="bold" if is_best else ""),
            *(column.cells[row] for column in columns),
        )
    return table


def point_text(point: MixPoint) -> Text:
    """Mean lambda_c with its standard error, or the outcome's name; how many where not all."""
    if point.lambda_c_mean is None:
        return Text(outcome_words(point), style="yellow")
    text = Text(f"{number(point.lambda_c_mean)}{spread(point.lambda_c_standard_error)}")
    if point.num_converged < point.num_repeats:
        text.append(f" ({point.num_converged} of {point.num_repeats})", style="yellow")
    return text


def unit_text(summary: MixUnitSummary) -> Text:
    """A finished unit in one line: its sweet spot, or its tasks where it has a single ratio."""
    text = Text()
    for position, point in enumerate(summary.points):
        text.append(", " if position else "").append(f"{point.task} ")
        text.append_text(point_text(point))
    if not summary.points:
        spot = summary.sweet_spot
        text.append("no sweet spot" if spot is None else f"sweet spot {spot.ratio:.3g}")
        if spot is not None:
            text.append(f", lambda_c {number(spot.lambda_c)} ({spot.task})")
        found = f"  {summary.outcomes.get('converged', 0)} of {summary.num_searches} with an answer"
        text.append(found, style="dim")
    return text
