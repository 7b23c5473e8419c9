"""The chart of a mix scan: critical sharpness of every task against the ratio (torch-free).

Drawn per task: the mean of the repeats, its brackets, a mark on the axis at every ratio whose
direction does not descend the task's loss or has no answer otherwise. The sweet spot is a dashed
line with its bootstrap interval as a band.
"""

from collections.abc import Sequence
from typing import Any

import altair as alt

from probe.chart_style import (
    INK,
    NOT_XML,
    PALETTE,
    SHAPES,
    WIDTH,
    Rows,
    Theme,
    chart_config,
    drawing_of,
    log_ticks,
    on_axis,
)
from probe.errors import ConfigError
from probe.mix_summary import summarise_scans
from probe.result_mix import MixPoint, MixScan, MixUnitResult

_HEIGHT = 320
_MAX_TICKS = 21
_LINE = 15  # pixels between the marks of one task and the next, below the curves


def mix_chart(results: Sequence[MixUnitResult], theme: Theme = "light") -> alt.VConcatChart:
    """Critical sharpness (log scale) against the ratio, one panel per checkpoint.

    Args:
        results: Finished units of one job, at least one.
        theme: Colours for a light or a dark page.

    Raises:
        ConfigError: `results` is empty.
    """
    if not results:
        raise ConfigError("a chart needs at least one finished unit; found none")
    scans = summarise_scans(results)
    tasks = list(dict.fromkeys(p.task for scan in scans for p in scan.points))
    color = _color(tasks, theme)
    panels = [_panel(scan, tasks, color, theme) for scan in scans]
    title = NOT_XML.sub("", str(results[0].spec.get("name", ""))) or "mix scan"
    chart: alt.VConcatChart = (
        alt.vconcat(*panels, spacing=18)
        .resolve_scale(color="shared", shape="shared")
        .properties(title=alt.TitleParams(title, subtitle=_subtitle(results[0])))
        .configure(**chart_config(theme))
    )
    return chart


def _panel(scan: MixScan, tasks: list[str], color: alt.Color, theme: Theme) -> Any:
    means, gaps = _rows(scan)
    domain = _domain(means, num_lines=len({row["task"] for row in gaps}))
    ratios = sorted({point.ratio for point in scan.points})
    pad = 0.02 * (ratios[-1] - ratios[0]) or 0.05
    x = alt.X(
        "ratio:Q",
        title=f"share of {_clean(scan.varied)} in the training mix",
        scale=alt.Scale(domain=[ratios[0] - pad, ratios[-1] + pad], nice=False, zero=False),
        # Ticks at what was measured, until there are too many.
        axis=alt.Axis(
            format=".3~g",
            grid=False,
            labelOverlap=True,
            values=ratios if len(ratios) <= _MAX_TICKS else alt.Undefined,
        ),
    )
    y = alt.Y(
        "lambda_c:Q",
        title="relative critical sharpness λ_c  (1/η)",
        scale=alt.Scale(type="log", domain=domain, nice=False),
        axis=alt.Axis(format="~s", values=log_ticks(*domain)),
    )
    layers = _sweet_spot_layers(scan, x, theme)
    with_gaps = [task for task in tasks if any(row["task"] == task for row in gaps)]
    outcomes = [o for o in SHAPES if any(row["outcome"] == o for row in gaps)]
    for line, task in enumerate(with_gaps):
        marks = [row for row in gaps if row["task"] == task]
        layers.append(_gap_layer(marks, outcomes, _HEIGHT - 9 - _LINE * line, x, color))
    layers += _answer_layers(means, x, y, color)
    name = alt.TitleParams(_clean(scan.checkpoint), fontSize=12, anchor="start")
    return alt.layer(*layers).properties(width=WIDTH, height=_HEIGHT, title=name)


def _rows(scan: MixScan) -> tuple[Rows, Rows]:
    """(one row per ratio and task, one per outcome without an answer there)."""
    means: Rows = []
    gaps: Rows = []
    for point in scan.points:
        base = {"ratio": point.ratio, "task": _clean(point.task)}
        means.append(base | _numbers(point))
        gaps += [
            base | {"outcome": outcome, "searches": f"{count} of {point.num_repeats}"}
            for outcome, count in point.outcomes.items()
            if outcome != "converged" and count
        ]
    return means, gaps


def _numbers(point: MixPoint) -> dict[str, Any]:
    mean, error = point.lambda_c_mean, point.lambda_c_standard_error
    low = None if mean is None or error is None else mean - error
    return {
        "lambda_c": mean,
        "error": error,
        "lower": point.lambda_c_lower,
        "upper": point.lambda_c_upper,
        # A log axis ends above zero: an error as large as the mean stops at the bracket.
        "low": low if low is None or low > 0 else point.lambda_c_lower,
        "high": None if mean is None or error is None else mean + error,
        "converged": f"{point.num_converged} of {point.num_repeats}",
        "slope": point.slope_mean,
    }


def _domain(means: Rows, *, num_lines: int) -> list[float]:
    """Limits of the log axis: every answer, and room below for the lines of marks."""
    keys = ("lambda_c", "lower", "upper", "low", "high")
    found = [v for row in means for k in keys if (v := row[k]) is not None and v > 0]
    low, high = (min(found), max(found)) if found else (1.0, 10.0)
    margin = max((high / low) ** 0.08, 1.15)
    room = (high * margin / (low / margin)) ** (_LINE * num_lines / (_HEIGHT - _LINE * num_lines))
    return [low / margin / room, high * margin]


def _color(tasks: list[str], theme: Theme) -> alt.Color:
    names = [_clean(task) for task in tasks]
    palette = PALETTE[theme]
    hues = [palette[index % len(palette)] for index in range(len(names))]
    legend = alt.Legend(title="loss of:", orient="top", direction="horizontal", labelLimit=200)
    return alt.Color("task:N", scale=alt.Scale(domain=names, range=hues), legend=legend)


def _sweet_spot_layers(scan: MixScan, x: alt.X, theme: Theme) -> list[Any]:
    spot = scan.sweet_spot
    if spot is None:
        return []
    row = spot.model_dump() | {"task": _clean(spot.task)}
    layers = []
    if spot.lower is not None and spot.upper is not None and spot.lower < spot.upper:
        band = drawing_of([row]).mark_rect(opacity=0.10, color=INK[theme][0])
        layers.append(band.encode(x=_at(x, "lower"), x2="upper:Q"))
    tooltip = [
        alt.Tooltip("ratio:Q", title="sweet spot", format=".4g"),
        alt.Tooltip("eta_c:Q", title="largest η no task objects to", format=".4g"),
        alt.Tooltip("task:N", title="objects first"),
        alt.Tooltip("lower:Q", title="90 % of bootstraps from", format=".4g"),
        alt.Tooltip("upper:Q", title="to", format=".4g"),
    ]
    line = drawing_of([row]).mark_rule(strokeDash=[6, 4], strokeWidth=1.5, color=INK[theme][0])
    label = drawing_of([row | {"text": f"sweet spot {spot.ratio:.3g}"}]).mark_text(
        align="left", dx=5, dy=-2, baseline="top", color=INK[theme][0], fontSize=11
    )
    layers.append(line.encode(x=_at(x, "ratio"), tooltip=tooltip))
    layers.append(label.encode(x=_at(x, "ratio"), y=alt.value(4), text="text:N"))
    return layers


def _at(x: alt.X, field: str) -> Any:
    """The ratio's axis, another field of the sweet spot."""
    return on_axis(x, field)  # type: ignore[arg-type]  # both are position channels


def _answer_layers(means: Rows, x: alt.X, y: alt.Y, color: alt.Color) -> list[Any]:
    answered = drawing_of([row for row in means if row["lambda_c"] is not None])
    # The line breaks at a ratio without an answer: its rows stay in, with a null.
    line = drawing_of(means).mark_line(strokeWidth=1.8, invalid="break-paths-show-domains")
    layers = [
        line.encode(x=x, y=y, color=color),
        answered.mark_rule(strokeWidth=1.2).encode(
            x=x, y=on_axis(y, "lower"), y2="upper:Q", color=color
        ),
    ]
    errors = [row for row in means if row["low"] is not None]
    if errors:
        bars = drawing_of(errors).mark_rule(strokeWidth=4, opacity=0.6)
        layers.append(bars.encode(x=x, y=on_axis(y, "low"), y2="high:Q", color=color))
    tooltip = [
        alt.Tooltip("task:N", title="loss of"),
        alt.Tooltip("ratio:Q", title="ratio", format=".4g"),
        alt.Tooltip("lambda_c:Q", title="λ_c", format=".4g"),
        alt.Tooltip("error:Q", title="standard error", format=".2g"),
        alt.Tooltip("lower:Q", title="bracket from", format=".4g"),
        alt.Tooltip("upper:Q", title="to", format=".4g"),
        alt.Tooltip("slope:Q", title="slope at η = 0", format=".3g"),
        alt.Tooltip("converged:N", title="searches with an answer"),
    ]
    points = answered.mark_point(filled=True, size=45, opacity=1)
    return [*layers, points.encode(x=x, y=y, color=color, tooltip=tooltip)]


def _gap_layer(gaps: Rows, seen: list[Any], height: int, x: alt.X, color: alt.Color) -> Any:
    """Searches of one task without an answer, on a line of their own, by outcome."""
    shape = alt.Shape(
        "outcome:N",
        scale=alt.Scale(domain=[o.value for o in seen], range=[SHAPES[o] for o in seen]),
        legend=alt.Legend(title="no answer:", orient="bottom", direction="horizontal"),
    )
    marks = drawing_of(gaps).mark_point(size=70, strokeWidth=1.8, filled=False)
    tooltip = ["task:N", alt.Tooltip("ratio:Q", format=".4g"), "outcome:N", "searches:N"]
    return marks.encode(x=x, y=alt.value(height), shape=shape, color=color, tooltip=tooltip)


def _subtitle(result: MixUnitResult) -> list[str]:
    first = result.provenance
    mixture = result.spec["mixture"]
    names = ", ".join(_clean(source["name"]) for source in mixture["sources"])
    return [
        f"{first.num_parameters:,} parameters, {first.dtype}, moments: {first.moments}; "
        f"mix of {names}; {mixture['gradients']} gradients",
        "thick bar: ± standard error, thin bar: brackets of all repeats; marks on the axis: the "
        "first step already hurts, or no answer",
    ]


def _clean(text: str) -> str:
    return NOT_XML.sub("", text)[:80]
