"""Charts of a checkpoint series: critical sharpness beside 2/eta, and the loss (torch-free).

One Vega-Lite chart serves the dashboard, SVG and PNG; the pictures are drawn offline by
vl-convert with the fonts it carries. What has no answer is drawn as such, on the axis, by its
outcome. Flat rows for other tools are in `probe/tables.py`.
"""

from collections.abc import Sequence
from typing import Any

import altair as alt

from probe.chart_style import (
    NOT_XML,
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
from probe.line_search import SearchOutcome
from probe.result import UnitResult
from probe.schedule import rate_function
from probe.spec import Schedule

THRESHOLD = "2/η, the stability threshold"
_SERIES_NAME = {"update": "λ_c on the update batch", "held_out": "λ_c on the held-out batch"}
_NUM_SCHEDULE_POINTS = 400
_HEIGHT, _LOSS_HEIGHT = 300, 90
# Okabe and Ito's colours: told apart also by colour-blind readers.
_COLORS = {
    "light": {"update": "#0072B2", "held_out": "#D55E00", "threshold": "#6B6B6B"},
    "dark": {"update": "#56B4E9", "held_out": "#F0A030", "threshold": "#A8A8A8"},
}


def series_chart(results: Sequence[UnitResult], theme: Theme = "light") -> alt.VConcatChart:
    """Critical sharpness (log scale) against the training step, above the loss.

    Drawn: the mean of the repeats with its bracket (thin) and standard error (thick), every
    repeat as a faint dot, one colour per loss batch, 2/eta of the run's schedule as a dashed
    line where the spec states one, and a mark on the axis for every search without an answer.

    Args:
        results: Finished units of one job, at least one. The x axis holds training steps, or
            the checkpoints' names in unit order where one of them has no step.
        theme: Colours for a light or a dark page.

    Raises:
        ConfigError: `results` is empty.
    """
    if not results:
        raise ConfigError("a chart needs at least one finished unit; found none")
    results = sorted(results, key=lambda result: result.unit.index)
    position = _XAxis(results)
    means, repeats, gaps = _rows(results, position)
    threshold = _threshold_rows(results, position)
    domain = _log_domain(means, repeats, threshold)
    used = [batch for batch in _SERIES_NAME if any(r["loss_batch"] == batch for r in means)]
    color = _color(used, theme, with_threshold=bool(threshold))
    y = alt.Y(
        "lambda_c:Q",
        title="critical sharpness λ_c = 2/η_c  (1/η)",
        scale=alt.Scale(type="log", domain=domain, nice=False),
        axis=alt.Axis(format="~s", values=log_ticks(*domain)),
    )
    layers = [
        _gap_layer(ours, _outcomes(gaps), _HEIGHT - 9 - 15 * line, position, color)
        for line, batch in enumerate(used)
        if (ours := [row for row in gaps if row["loss_batch"] == batch])
    ]
    if threshold:
        layers.append(_threshold_layer(threshold, position, y, color))
    layers += _answer_layers(means, repeats, position, y, color)
    sharpness = alt.layer(*layers).properties(width=WIDTH, height=_HEIGHT)
    loss = _loss_panel(means, position, color)
    title = NOT_XML.sub("", str(results[0].spec.get("name", ""))) or "critical sharpness"
    chart: alt.VConcatChart = (
        alt.vconcat(sharpness, loss, spacing=14)
        .resolve_scale(color="shared", strokeDash="shared")
        .properties(title=alt.TitleParams(title, subtitle=_subtitle(results, means, gaps)))
        .configure(**chart_config(theme))
    )
    return chart


class _XAxis:
    """Where a unit stands on the x axis: at its step, or at its name where steps are missing."""

    def __init__(self, results: Sequence[UnitResult]) -> None:
        self.steps = [result.unit.checkpoint_ref.step for result in results]
        self.by_step = None not in self.steps and len(set(self.steps)) == len(self.steps) > 1
        self.labels = _unique([_clean_label(result) for result in results])
        self._label_of = {r.unit.unit_id: x for r, x in zip(results, self.labels, strict=True)}

    def of(self, result: UnitResult) -> int | str:
        step = result.unit.checkpoint_ref.step
        return step if self.by_step and step is not None else self._label_of[result.unit.unit_id]

    def encoding(self, *, lowest_panel: bool = False) -> alt.X:
        if self.by_step:
            steps = [step for step in self.steps if step is not None]
            pad = 0.02 * (max(steps) - min(steps))
            scale = alt.Scale(domain=[min(steps) - pad, max(steps) + pad], nice=False, zero=False)
            axis = alt.Axis(format=",d", tickCount=8, tickMinStep=1, labelOverlap=True, grid=False)
            title = "training step" if lowest_panel else None
            return alt.X("x:Q", title=title, scale=scale, axis=axis)
        axis = alt.Axis(
            labelAngle=0 if len(self.labels) <= 3 else -35,
            labelLimit=180,
            labelOverlap=True,
            labels=lowest_panel,
        )
        scale = alt.Scale(domain=self.labels)
        title = "checkpoint" if lowest_panel else None
        return alt.X("x:N", title=title, sort=self.labels, axis=axis, scale=scale)

    def tooltip(self) -> alt.Tooltip:
        if self.by_step:
            return alt.Tooltip("x:Q", title="step", format="d")
        return alt.Tooltip("x:N", title="checkpoint")


def _clean_label(result: UnitResult) -> str:
    return NOT_XML.sub("", result.unit.checkpoint_ref.label)[:80]


def _unique(labels: list[str]) -> list[str]:
    """The labels, with a number appended from the second of equal ones on."""
    out: list[str] = []
    for label in labels:
        name, count = label, 1
        while name in out:
            count += 1
            name = f"{label} ({count})"
        out.append(name)
    return out


def _rows(results: Sequence[UnitResult], position: _XAxis) -> tuple[Rows, Rows, Rows]:
    """(one row per summary, one per repeat with an answer, one per outcome without)."""
    means: Rows = []
    repeats: Rows = []
    gaps: Rows = []
    for result in results:
        x = position.of(result)
        for s in result.summaries:
            base = {"x": x, "loss_batch": s.loss_batch, "series": _SERIES_NAME[s.loss_batch]}
            mean, error = s.lambda_c_mean, s.lambda_c_standard_error
            low = None if mean is None or error is None else mean - error
            means.append(
                base
                | {"loss": s.loss_mean, "lambda_c": mean, "error": error}
                | {"lower": s.lambda_c_lower, "upper": s.lambda_c_upper}
                # A log axis ends above zero: an error as large as the mean stops at the bracket.
                | {"low": low if low is None or low > 0 else s.lambda_c_lower}
                | {"high": None if mean is None or error is None else mean + error}
                | {"converged": f"{s.num_converged} of {s.num_repeats}"}
            )
            if s.num_repeats > 1:
                repeats += [base | {"lambda_c": v} for v in s.lambda_c_values if v is not None]
            gaps += [
                base | {"outcome": outcome, "searches": f"{count} of {s.num_repeats}"}
                for outcome, count in s.outcomes.items()
                if outcome != SearchOutcome.CONVERGED and count
            ]
    return means, repeats, gaps


def _threshold_rows(results: Sequence[UnitResult], position: _XAxis) -> Rows:
    """2/eta of the schedule, between the checkpoints too where the x axis holds steps."""
    at_units = [
        {"x": position.of(result), "lambda_c": result.stability_threshold, "series": THRESHOLD}
        for result in results
        if result.stability_threshold is not None
    ]
    if not position.by_step or not at_units:
        return at_units
    schedule = Schedule.model_validate(results[0].spec.get("schedule", {}))
    steps = [step for step in position.steps if step is not None]
    first, last = min(steps), max(steps)
    corners = [schedule.warmup_steps, schedule.decay_start, schedule.total_steps]
    points = {
        first + (last - first) * i // _NUM_SCHEDULE_POINTS for i in range(_NUM_SCHEDULE_POINTS)
    } | set(steps)
    points |= {step for step in corners if step is not None and first <= step <= last}
    rate, _ = rate_function(schedule, results[0].unit.checkpoint_ref)
    rates = [(step, None if rate is None else rate(step)) for step in sorted(points)]
    rows = [{"x": x, "lambda_c": 2 / r, "series": THRESHOLD} for x, r in rates if r]
    return rows or at_units


def _log_domain(means: Rows, repeats: Rows, threshold: Rows) -> list[float]:
    """Limits of the log axis: every answer, and 2/eta as far as a factor of 10 beyond them.

    During warm-up and at the end of a decay 2/eta goes to infinity; without that limit it
    would press everything measured into a corner.
    """
    keys = ("lambda_c", "lower", "upper", "low", "high")
    found = [v for r in means + repeats for k in keys if (v := r.get(k)) is not None and v > 0]
    lines = [row["lambda_c"] for row in threshold]
    if not found:
        found = [min(lines), min(min(lines) * 100, max(lines))] if lines else [1.0, 10.0]
    low, high = min(found), max(found)
    near = [value for value in lines if low / 10 <= value <= high * 10]
    low, high = min([low, *near]), max([high, *near])
    margin = max((high / low) ** 0.08, 1.15)
    # Room below for the marks of searches without an answer.
    return [low / margin**2, high * margin]


def _color(used: list[str], theme: Theme, *, with_threshold: bool) -> dict[str, Any]:
    """Colour and dash of every series, named in one legend."""
    names = [_SERIES_NAME[batch] for batch in used]
    colors = [_COLORS[theme][batch] for batch in used]
    dashes = [[1, 0] for _ in used]
    if with_threshold:
        names, colors = [*names, THRESHOLD], [*colors, _COLORS[theme]["threshold"]]
        dashes = [*dashes, [6, 4]]
    legend = alt.Legend(
        title=None, orient="top", direction="horizontal", labelLimit=300, symbolSize=400,
        symbolType="stroke", symbolStrokeWidth=2.5,
    )  # fmt: skip
    return {
        "color": alt.Color("series:N", scale=alt.Scale(domain=names, range=colors), legend=legend),
        "strokeDash": alt.StrokeDash(
            "series:N", scale=alt.Scale(domain=names, range=dashes), legend=legend
        ),
    }


def _threshold_layer(rows: Rows, position: _XAxis, y: alt.Y, color: dict[str, Any]) -> Any:
    chart = drawing_of(rows)
    tooltip = [position.tooltip(), alt.Tooltip("lambda_c:Q", title="2/η", format=".4g")]
    if len(position.labels) == 1:  # a line needs two places
        return chart.mark_rule(strokeWidth=2).encode(y=y, tooltip=tooltip, **color)
    line = chart.mark_line(clip=True, strokeWidth=2)
    return line.encode(x=position.encoding(), y=y, tooltip=tooltip, **color)


def _answer_layers(
    means: Rows, repeats: Rows, position: _XAxis, y: alt.Y, color: dict[str, Any]
) -> list[Any]:
    x = position.encoding()
    answered = drawing_of([r for r in means if r["lambda_c"] is not None])
    hue = color["color"]
    size = min(55.0, 6000 / len(position.labels) ** 1.1)
    # The line breaks at a checkpoint without an answer: its rows stay in, with a null.
    line = drawing_of(means).mark_line(
        strokeWidth=1.5, opacity=0.8, invalid="break-paths-show-domains"
    )
    layers = [
        line.encode(x=x, y=y, **color),
        answered.mark_rule(strokeWidth=1.2).encode(
            x=x, y=on_axis(y, "lower"), y2="upper:Q", color=hue
        ),
    ]
    if any(row["low"] is not None for row in means):
        errors = drawing_of([r for r in means if r["low"] is not None])
        layers.append(
            errors.mark_rule(strokeWidth=4, opacity=0.75).encode(
                x=x, y=on_axis(y, "low"), y2="high:Q", color=hue
            )
        )
    if repeats:
        dots = drawing_of(repeats).mark_circle(size=size / 3, opacity=0.35)
        layers.append(dots.encode(x=x, y=y, color=hue))
    tooltip = [
        position.tooltip(),
        alt.Tooltip("series:N", title="loss"),
        alt.Tooltip("lambda_c:Q", title="λ_c", format=".4g"),
        alt.Tooltip("error:Q", title="standard error", format=".2g"),
        alt.Tooltip("lower:Q", title="bracket from", format=".4g"),
        alt.Tooltip("upper:Q", title="to", format=".4g"),
        alt.Tooltip("converged:N", title="searches with an answer"),
        alt.Tooltip("loss:Q", title="loss at η = 0 (nats per token)", format=".4f"),
    ]
    points = answered.mark_point(filled=True, size=size, opacity=1)
    return [*layers, points.encode(x=x, y=y, color=hue, tooltip=tooltip)]


def _outcomes(gaps: Rows) -> list[SearchOutcome]:
    return [o for o in SHAPES if any(row["outcome"] == o for row in gaps)]


def _gap_layer(
    gaps: Rows, seen: list[SearchOutcome], height: int, position: _XAxis, color: dict[str, Any]
) -> Any:
    """Searches of one loss batch without an answer, on a line of their own, by outcome."""
    shape = alt.Shape(
        "outcome:N",
        scale=alt.Scale(domain=[o.value for o in seen], range=[SHAPES[o] for o in seen]),
        legend=alt.Legend(title="no answer:", orient="bottom", direction="horizontal"),
    )
    return (
        drawing_of(gaps)
        .mark_point(size=70, strokeWidth=1.8, filled=False)
        .encode(
            x=position.encoding(),
            y=alt.value(height),
            shape=shape,
            color=color["color"],
            tooltip=[position.tooltip(), "series:N", "outcome:N", "searches:N"],
        )
    )


def _loss_panel(means: Rows, position: _XAxis, color: dict[str, Any]) -> Any:
    y = alt.Y("loss:Q", title="loss (nats/token)", scale=alt.Scale(zero=False, nice=True))
    base = drawing_of(means).encode(x=position.encoding(lowest_panel=True), y=y)
    line = base.mark_line(strokeWidth=1.5).encode(**color)
    points = base.mark_point(filled=True, size=25, opacity=1).encode(
        color=color["color"],
        tooltip=[position.tooltip(), "series:N", alt.Tooltip("loss:Q", format=".4f")],
    )
    return alt.layer(line, points).properties(width=WIDTH, height=_LOSS_HEIGHT)


def _subtitle(results: Sequence[UnitResult], means: Rows, gaps: Rows) -> list[str]:
    first = results[0].provenance
    model = f"{first.num_parameters:,} parameters, {first.dtype}, moments: {first.moments}"
    key = "thin bar: bracket of η_c"
    if any(row["error"] is not None for row in means):
        key = "thick bar: ± standard error, thin bar: brackets of all repeats, faint: each repeat"
    if not any(row["lambda_c"] is not None for row in means):
        key = "no checkpoint has an answer yet"
    marks = "; marks on the axis: searches without an answer" if gaps else ""
    return [model, key + marks]
