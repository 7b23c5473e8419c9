"""The chart of continual learning (torch-free): accuracy over tasks, then what explains it.

On top, accuracy of every task over seeds. Then per method: what each bound predicts, effective
steps against the combined bound per layer, and signals of the whole network; there a line is the
median over seeds, so that one wild run does not hide the others.
"""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from probe.chart_continual_panels import (
    Datasets,
    caption,
    clean,
    color_of,
    method_panels,
    thinning,
)
from probe.chart_style import NOT_XML, Rows, Theme, chart_config, on_axis
from probe.continual_lines import arms_of
from probe.continual_summary import summarise_continual
from probe.errors import ConfigError
from probe.result_continual import ContinualUnitResult
from probe.result_curves import ContinualSummary, LearningCurve

_WIDE, _HEIGHT = 286, 170
_MOST_METHODS = 6  # with panels of their own below the accuracies
_FEW_TASKS = 12  # so many have a tick and a large dot each
_TOOLTIP = [
    alt.Tooltip("series:N", title="of"),
    alt.Tooltip("task:Q"),
    alt.Tooltip("accuracy:Q", title="mean", format=".4f"),
    alt.Tooltip("error:Q", title="standard error", format=".2g"),
    alt.Tooltip("runs:Q"),
]


def continual_chart(
    results: Sequence[ContinualUnitResult], theme: Theme = "light"
) -> alt.VConcatChart:
    """Accuracy per task with bands, predictions, steps against bounds per layer, signals.

    Args:
        results: Finished units of one job, at least one.
        theme: Colours for a light or a dark page.

    Raises:
        ConfigError: `results` is empty.
    """
    summary = summarise_continual(results)
    if summary is None:
        raise ConfigError("a chart needs at least one finished unit; found none")
    arms = arms_of(results)
    methods = list(dict.fromkeys(curve.method for curve in summary.curves))
    datasets = Datasets()
    parts = [_accuracies(summary, methods, datasets, theme)]
    for method in methods[:_MOST_METHODS]:
        own = [arm for arm in arms if arm.method == method and arm.runs]
        if own:
            parts.append(method_panels(own, _controls(summary), datasets, theme))
    title = NOT_XML.sub("", str(results[0].spec.get("name", ""))) or "continual learning"
    chart: alt.VConcatChart = (
        alt.vconcat(*parts, spacing=26)
        .resolve_scale(color="independent", strokeDash="independent")
        .configure(**chart_config(theme))
        .properties(  # last: every other step would copy the rows
            title=alt.TitleParams(title, subtitle=_subtitle(results[0], summary, methods)),
            datasets=datasets.rows,
        )
    )
    return chart


def _controls(summary: ContinualSummary) -> list[str]:
    return list(dict.fromkeys(curve.control for curve in summary.curves))


def _accuracies(
    summary: ContinualSummary, methods: list[str], datasets: Datasets, theme: Theme
) -> Any:
    """A panel per method with a line per control; with one control, one panel of all methods."""
    controls = _controls(summary)
    if len(controls) == 1 and len(methods) > 1:
        color = color_of(methods, theme)
        lines = [(curve.method, curve) for curve in summary.curves]
        return _accuracy_panel(lines, summary, color, datasets, None, width=2 * _WIDE)
    color = color_of(controls, theme)
    width = _WIDE if len(methods) > 1 else 2 * _WIDE
    panels = [
        _accuracy_panel(
            [(curve.control, curve) for curve in summary.curves if curve.method == method],
            summary,
            color,
            datasets,
            method,
            width=width,
        )
        for method in methods
    ]
    return alt.concat(*panels, columns=2, spacing=16).resolve_scale(color="shared")


def _accuracy_panel(
    lines: list[tuple[str, LearningCurve]],
    summary: ContinualSummary,
    color: alt.Color,
    datasets: Datasets,
    title: str | None,
    *,
    width: int,
) -> Any:
    rows, diverged = accuracy_rows(lines, summary.num_tasks)
    is_short = summary.num_tasks <= _FEW_TASKS
    x = alt.X(
        "task:Q",
        title="task",
        scale=alt.Scale(domain=[0, max(1, summary.num_tasks - 1)], nice=False, zero=False),
        axis=alt.Axis(
            grid=False,
            format="d",
            values=list(range(summary.num_tasks)) if is_short else alt.Undefined,
        ),
    )
    top = _highest(summary)
    y = alt.Y("accuracy:Q", title="accuracy of the task", scale=alt.Scale(domain=[0, top]))
    with_band = [row for row in rows if row["low"] is not None]
    band = datasets.chart_of(with_band).mark_area(opacity=0.22, clip=True)
    line = datasets.chart_of(rows).mark_line(
        strokeWidth=1.8,
        point=alt.OverlayMarkDef(size=28 if is_short else 14),
        invalid="break-paths-show-domains",
    )
    layers = [
        band.encode(x=x, y=on_axis(y, "low"), y2="high:Q", color=color),
        line.encode(x=x, y=y, color=color, tooltip=_TOOLTIP),
    ]
    if diverged:
        cross = datasets.chart_of(diverged).mark_point(
            shape="cross", angle=45, size=60, filled=True
        )
        told = [alt.Tooltip("series:N", title="diverged:"), "task:Q", "seed:Q"]
        layers.append(cross.encode(x=x, y=alt.value(_HEIGHT - 6), color=color, tooltip=told))
    panel = alt.layer(*layers).properties(width=width, height=_HEIGHT)
    return panel if title is None else panel.properties(title=caption(title, 12))


def _highest(summary: ContinualSummary) -> float:
    """Where the axis of all panels ends: at 1, or at the next tenth above all bands."""
    ends = [
        point.mean + (point.standard_error or 0.0)
        for curve in summary.curves
        for point in curve.tasks
        if point.mean is not None
    ]
    return min(1.0, math.ceil(10 * max(ends, default=1.0) + 0.2) / 10)


def accuracy_rows(lines: Sequence[tuple[str, LearningCurve]], num_tasks: int) -> tuple[Rows, Rows]:
    """(a row per line and task that is drawn, a row per run that diverged)."""
    every = thinning(num_tasks)
    rows: Rows = []
    diverged: Rows = []
    for name, curve in lines:
        series = clean(name)
        for point in curve.tasks:
            if point.task % every and point.task != num_tasks - 1:
                continue
            mean, error = point.mean, point.standard_error
            spread = None if mean is None or error is None else error
            rows.append(
                {
                    "series": series,
                    "task": point.task,
                    "accuracy": mean,
                    "error": error,
                    "low": None if spread is None or mean is None else mean - spread,
                    "high": None if spread is None or mean is None else mean + spread,
                    "runs": point.num_runs,
                }
            )
        diverged += [
            {"series": series, "task": run.diverged_at, "seed": run.run.seed}
            for run in curve.runs
            if run.diverged_at is not None
        ]
    return rows, diverged


def _subtitle(
    result: ContinualUnitResult, summary: ContinualSummary, methods: list[str]
) -> list[str]:
    stream = result.spec["stream"]
    every = thinning(summary.num_tasks)
    lines = [
        f"{stream['type'].replace('_', ' ')}, {summary.num_tasks} tasks, "
        f"{result.provenance.num_parameters:,} parameters, {result.spec['optimizer']['name']}; "
        "accuracy: mean while a task is learned, band ± standard error over seeds",
    ]
    if summary.num_diverged:
        lines.append(
            f"{summary.num_diverged} of {summary.num_runs} runs diverged (cross) and are left out"
        )
    notes = []
    if every > 1:
        notes.append(f"every {every}. task is drawn")
    if len(methods) > _MOST_METHODS:
        notes.append(f"below the accuracies the first {_MOST_METHODS} of {len(methods)} methods")
    return [*lines, "; ".join(notes)] if notes else lines
