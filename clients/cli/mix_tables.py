"""Rich tables of a mix scan: a row per ratio, a column per task, and what it comes to.

As in `clients.cli.tables`, what users have named is wrapped in `Text`.
"""

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clients.cli.tables import number, plain_table, results_table, spread
from probe.mix_summary import summarise_scans
from probe.mix_text import (
    crossing_sentences,
    grid,
    outcome_words,
    sweet_spot_sentence,
    tasks_of,
)
from probe.reports import mix_results, series_results
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
    rows = grid(scan)
    first = max(len(scan.varied[:_MAX_NAME]), *(len(f"{ratio:.4g} *") for ratio, _ in rows))
    taken: list[int] = []
    left = width - first
    for column, task in enumerate(tasks_of(scan)):
        cells = [len(point_text(points[column])) for _, points in rows if column < len(points)]
        needed = _GAP + max(min(len(task), _MAX_NAME), *cells)
        if taken and needed > left:
            yield _scan_table(scan, taken)
            taken, left = [], width - first
        taken.append(column)
        left -= needed
    yield _scan_table(scan, taken)


def _scan_table(scan: MixScan, columns: Sequence[int]) -> Table:
    """One row per ratio; the sweet spot's has a star."""
    tasks = tasks_of(scan)
    table = plain_table()
    table.add_column(Text(scan.varied), justify="right", overflow="fold", max_width=_MAX_NAME)
    for column in columns:
        table.add_column(Text(tasks[column]), justify="right", overflow="fold", max_width=_MAX_NAME)
    for ratio, points in grid(scan):
        is_best = scan.sweet_spot is not None and scan.sweet_spot.ratio == ratio
        table.add_row(
            Text(f"{ratio:.4g}{' *' if is_best else ''}", style="bold" if is_best else ""),
            *(point_text(points[column]) for column in columns if column < len(points)),
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
