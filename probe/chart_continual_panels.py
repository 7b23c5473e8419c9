"""The panels of one method of continual learning (torch-free): predictions, steps, signals.

Lines are means (accuracy and its predictions) or medians over seeds (signals and bounds, so that
one wild run does not hide the others).
"""

from collections.abc import Sequence
from typing import Any

import altair as alt

from probe.chart_style import INK, NOT_XML, PALETTE, Rows, Theme, log_ticks
from probe.continual_lines import Arm, clipped_domain, layer_line, mean_line, run_line
from probe.continual_summary import BOUNDS

_COLUMNS = 4
_SMALL, _SMALL_HEIGHT = 116, 84
_FEW_POINTS = 14
_PANEL_TITLE = 10  # size of a small panel's; larger ones are bold
_BOUND_COLORS = {
    "light": {"gradient": "#009E73", "curvature": "#8A6D00", "combined": "#D55E00"},
    "dark": {"gradient": "#3DD3A8", "curvature": "#F0E442", "combined": "#F0A030"},
}
# (title, signal, of a layer or of the run, axis), of the whole network; `clipped` is a log axis
# that leaves out the wildest values: the volatility is zero where the sharpness stands still.
_SIGNALS = (
    ("learning rate", "learning_rate", "layer", "log"),
    ("top Hessian eigenvalue", "sharpness", "layer", "log"),
    ("sharpness volatility", "volatility", "layer", "clipped"),
    ("gradient norm", "gradient_norm", "layer", "log"),
    ("weight norm", "weight_norm", "layer", "linear"),
    ("Hessian rank", "hessian_rank", "run", "linear"),
    ("unit-sign entropy, bits", "unit_sign_entropy", "run", "linear"),
    ("dead units, share", "dead_units", "run", "linear"),
)


class Datasets:
    """The rows of all panels by name: charts that carry rows are copied with every step up."""

    def __init__(self) -> None:
        self.rows: dict[str, Rows] = {}

    def chart_of(self, rows: Rows) -> Any:
        """A chart of rows that are kept here."""
        name = f"rows-{len(self.rows)}"
        self.rows[name] = rows
        # Any: altair's mark and encode methods are untyped.
        return alt.Chart(alt.NamedData(name=name))


def color_of(names: Sequence[str], theme: Theme, *, legend: bool = True) -> alt.Color:
    """A colour per name, the same in all panels."""
    palette = PALETTE[theme]
    shown = [clean(name) for name in names]
    hues = [palette[i % len(palette)] for i in range(len(shown))]
    told = alt.Legend(
        title=None,
        orient="top",
        columns=4,
        labelLimit=180,
        symbolType="stroke",
        symbolOpacity=1,
        symbolStrokeWidth=3,
    )
    return alt.Color(
        "series:N",
        scale=alt.Scale(domain=shown, range=hues),
        legend=told if legend else None,
    )


def caption(text: str, size: int) -> alt.TitleParams:
    """The title of a panel or of a group of them."""
    text = clean(text)
    if size > _PANEL_TITLE:
        return alt.TitleParams(text, fontSize=size, anchor="start", fontWeight="bold")
    return alt.TitleParams(text, fontSize=size, anchor="start", fontWeight="normal")


def clean(text: str) -> str:
    """A name from a spec as it can be drawn."""
    return NOT_XML.sub("", text)[:80]


def method_panels(
    arms: list[Arm], controls: Sequence[str], datasets: Datasets, theme: Theme
) -> Any:
    """Predictions, steps against bounds and signals of one method.

    Args:
        arms: The method's, those with a run that did not diverge; at least one.
        controls: Of the whole job: a control has one colour everywhere.
        datasets: Takes the rows.
        theme: Of the page.
    """
    color = color_of(controls, theme, legend=False)
    rows = [
        _predictions(arms, datasets, theme),
        _steps(arms, color, datasets),
        _signals(arms, color, datasets),
    ]
    return (
        alt.vconcat(*(row for row in rows if row is not None), spacing=14)
        .resolve_scale(color="independent", strokeDash="independent")
        .properties(title=caption(arms[0].method, 13))
    )


def _predictions(arms: list[Arm], datasets: Datasets, theme: Theme) -> Any:
    """Accuracy and what each bound predicts, 1 - its share of violations; a panel per control."""
    names = ["accuracy", *(f"predicted by {bound}" for bound in BOUNDS)]
    hues = [INK[theme][0], *(_BOUND_COLORS[theme][bound] for bound in BOUNDS)]
    color = alt.Color(
        "series:N",
        scale=alt.Scale(domain=names, range=hues),
        legend=alt.Legend(title=None, orient="top", columns=4, symbolType="stroke"),
    )
    panels = []
    for arm in arms:
        every = thinning(arm.num_tasks)
        rows = mean_line(arm, "accuracy", lambda task: task.accuracy, every)
        for bound in BOUNDS:
            rows += mean_line(arm, f"predicted by {bound}", _predicted(bound), every)
        y = alt.Y("value:Q", title=None, scale=alt.Scale(domain=[0, 1]), axis=_small_axis())
        panels.append(_small_panel(datasets, rows, y, color, arm.control, x_title="task"))
    return alt.concat(*panels, columns=_COLUMNS, spacing=12).resolve_scale(color="shared")


def _predicted(bound: Any) -> Any:
    def value(task: Any) -> float | None:
        share = (task.violation_share or {}).get(bound)
        return None if share is None else 1 - share

    return value


def _steps(arms: list[Arm], color: alt.Color, datasets: Datasets) -> Any | None:
    """Effective step (solid) and combined bound (dashed), a panel per layer."""
    dash = alt.StrokeDash(
        "what:N",
        scale=alt.Scale(domain=["effective step", "combined bound"], range=[[1, 0], [4, 3]]),
        legend=alt.Legend(title=None, orient="top", symbolType="stroke", symbolStrokeWidth=2),
    )
    panels = []
    for number in drawn_layers(len(arms[0].layer_names)):
        rows: Rows = []
        for signal, what in (
            ("effective_step", "effective step"),
            ("bound_combined", "combined bound"),
        ):
            for arm in arms:
                line = layer_line(arm, signal, number)
                rows += [row | {"what": what, "series": clean(arm.control)} for row in line]
        domain = clipped_domain(rows, {"effective step"})
        if domain is not None:
            title = f"step and bound: {arms[0].layer_names[number]}"
            panels.append(
                _small_panel(datasets, _positive(rows), _log_axis(domain), color, title, dash=dash)
            )
    if not panels:
        return None
    return alt.concat(*panels, columns=_COLUMNS, spacing=12)


def drawn_layers(num_layers: int) -> list[int]:
    """All, or the first, one in the middle, the last and the whole network."""
    if num_layers <= _COLUMNS:
        return list(range(num_layers))
    return [0, (num_layers - 2) // 2, num_layers - 2, num_layers - 1]


def _signals(arms: list[Arm], color: alt.Color, datasets: Datasets) -> Any | None:
    panels = []
    for title, signal, where, axis in _SIGNALS:
        rows: Rows = []
        for arm in arms:
            line = run_line(arm, signal) if where == "run" else layer_line(arm, signal, -1)
            rows += [row | {"series": clean(arm.control), "what": axis} for row in line]
        domain = _linear_domain(rows) if axis == "linear" else clipped_domain(rows, {"log"})
        if domain is None:
            continue
        if axis == "linear":
            y = alt.Y(
                "value:Q",
                title=None,
                scale=alt.Scale(domain=domain, nice=True, zero=False),
                axis=_small_axis(),
            )
            panels.append(_small_panel(datasets, rows, y, color, title))
        else:
            panels.append(_small_panel(datasets, _positive(rows), _log_axis(domain), color, title))
    if not panels:
        return None
    return alt.concat(*panels, columns=_COLUMNS, spacing=12)


def _small_panel(
    datasets: Datasets,
    rows: Rows,
    y: alt.Y,
    color: alt.Color,
    title: str,
    *,
    dash: alt.StrokeDash | None = None,
    x_title: str | None = None,
) -> Any:
    x = alt.X(
        "task:Q",
        title=x_title,
        scale=alt.Scale(nice=False, zero=False),
        axis=alt.Axis(grid=False, tickMinStep=1, tickCount=4, format="d", labelFontSize=9),
    )
    tooltip = [
        "series:N",
        alt.Tooltip("task:Q", format=".3~f"),
        alt.Tooltip("value:Q", format=".4g"),
    ]
    shown = datasets.chart_of([row | {"value": _short(row["value"])} for row in rows])
    # With few points each is marked: one between two gaps has no line to be seen by.
    is_sparse = len({row["task"] for row in rows}) <= _FEW_POINTS
    line = shown.mark_line(
        strokeWidth=1.3,
        clip=True,
        invalid="break-paths-show-domains",
        point=alt.OverlayMarkDef(size=9, strokeWidth=0) if is_sparse else False,
    )
    encoded = line.encode(x=x, y=y, color=color, tooltip=tooltip)
    if dash is not None:
        encoded = encoded.encode(strokeDash=dash)
    return encoded.properties(
        width=_SMALL, height=_SMALL_HEIGHT, title=caption(title, _PANEL_TITLE)
    )


def _log_axis(domain: list[float]) -> alt.Y:
    return alt.Y(
        "value:Q",
        title=None,
        scale=alt.Scale(type="log", domain=domain, nice=False),
        axis=_small_axis(
            format="~e" if domain[0] < 1e-3 or domain[1] > 1e4 else "~g",
            values=log_ticks(*domain),
            labelOverlap=True,
        ),
    )


def _small_axis(**options: Any) -> alt.Axis:
    return alt.Axis(labelFontSize=9, **({"tickCount": 4} | options))


def _positive(rows: Rows) -> Rows:
    """For a log axis: what is not above zero is a gap."""
    return [
        row | {"value": v if (v := row["value"]) is not None and v > 0 else None} for row in rows
    ]


def _linear_domain(rows: Rows) -> list[float] | None:
    values = [row["value"] for row in rows if row["value"] is not None]
    if not values:
        return None
    low, high = min(values), max(values)
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    return [low - pad, high + pad]


def thinning(num_tasks: int) -> int:
    """Every so many tasks are drawn: more points than pixels say nothing."""
    return max(1, -(-num_tasks // 200))


def _short(value: Any) -> float | None:
    return None if value is None else float(f"{value:.5g}")
