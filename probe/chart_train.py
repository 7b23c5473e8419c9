"""The heat maps of a training grid: ratio against learning rate, per task (torch-free).

Red is worse than the checkpoint, white the same, blue better; left the loss, right the accuracy. A
mix scan of the same checkpoint is drawn over them: the task's eta_c as a line, the sweet spot as a
diamond.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import altair as alt

from probe.chart_style import INK, NOT_XML, Rows, Theme, chart_config, drawing_of
from probe.errors import ConfigError
from probe.mix_summary import summarise_scans
from probe.result_mix import MixScan, MixUnitResult
from probe.result_train import MixTrainUnitResult, TrainCell, TrainTable
from probe.train_summary import summarise_training

_WIDTH, _HEIGHT = 300, 150
_BAD, _SAME, _GOOD, _DIVERGED = "#B2182B", "#FFFFFF", "#2166AC", "#4D4D4D"
_DARK, _LIGHT = "#1B1F24", "#FFFFFF"  # of numbers in cells


def train_chart(
    results: Sequence[MixTrainUnitResult],
    theme: Theme = "light",
    *,
    scan: Sequence[MixUnitResult] = (),
) -> alt.VConcatChart:
    """Change of every task's loss and accuracy, one row of two heat maps per task.

    Colours of a heat map saturate at its largest improvement, or where nothing improved at its
    largest change; the numbers stand in the cells, bold where they exceed two standard errors.

    Args:
        results: Finished units of one job, at least one.
        theme: Colours for a light or a dark page.
        scan: Units of a mix scan, to be drawn over the runs of the same checkpoints.

    Raises:
        ConfigError: `results` is empty.
    """
    if not results:
        raise ConfigError("a chart needs at least one finished unit; found none")
    grids = []
    by_label = {result.unit.checkpoint_ref.label: result.unit.checkpoint_ref for result in results}
    for table in summarise_training(results):
        checkpoint = by_label[table.checkpoint]
        scans = summarise_scans(unit for unit in scan if unit.unit.checkpoint_ref == checkpoint)
        grids.append(_grid_of(table, scans[0] if scans else None))
    title = NOT_XML.sub("", str(results[0].spec.get("name", ""))) or "training grid"
    chart: alt.VConcatChart = (
        alt.vconcat(*grids, spacing=24)
        .properties(title=alt.TitleParams(title, subtitle=_subtitle(results[0], bool(scan))))
        .configure(**chart_config(theme))
    )
    return chart


def _grid_of(table: TrainTable, scan: MixScan | None) -> Any:
    """One checkpoint: a row of two heat maps per task."""
    tasks = list(dict.fromkeys(cell.change.task for cell in table.cells))
    panels = []
    for task in tasks:
        cells = [cell for cell in table.cells if cell.change.task == task]
        kind = cells[0].change.accuracy_kind
        overlay = [] if scan is None else _overlay_rows(scan, task)
        for metric, title in (
            ("loss", f"{task}: loss, nats per token"),
            ("accuracy", f"{task}: {kind} accuracy, % points"),
        ):
            below = f"share of {_clean(table.varied)} in the training mix"
            panel = _panel(cells, metric, overlay, below if task == tasks[-1] else None)
            caption = alt.TitleParams(
                _clean(title), fontSize=11, anchor="start", fontWeight="normal"
            )
            panels.append(panel.properties(title=caption))
    name = alt.TitleParams(_clean(table.checkpoint), fontSize=12, anchor="start")
    return alt.concat(*panels, columns=2, spacing=14).properties(title=name)


def _panel(cells: Sequence[TrainCell], metric: str, overlay: Rows, below: str | None) -> Any:
    rows = cell_rows(cells, metric)
    x, y = _axes(rows, overlay, below)
    limit = _limit_of_colours(rows, metric)
    better_is_down = metric == "loss"
    colours = [_GOOD, _SAME, _BAD] if better_is_down else [_BAD, _SAME, _GOOD]
    color = alt.Color(
        "change:Q",
        # In rgb: other spaces pass through cyan on the way from blue to white.
        scale=alt.Scale(domain=[-limit, 0, limit], range=colours, clamp=True, interpolate="rgb"),
        legend=alt.Legend(title=None, gradientLength=_HEIGHT - 20, format="+.2~g"),
    )
    finished = [row for row in rows if row["change"] is not None]
    layers = []
    if finished:
        layers.append(_rectangles(finished, x, y).encode(color=color))
    if len(finished) < len(rows):
        diverged = [row for row in rows if row["change"] is None]
        layers.append(_rectangles(diverged, x, y).encode(color=alt.value(_DIVERGED)))
    layers += _overlay_layers(overlay, x, y)
    layers += _numbers(rows, limit, x, y)  # last: a curve must not cross them out
    return (
        alt.layer(*layers)
        .resolve_scale(color="independent")
        .properties(width=_WIDTH, height=_HEIGHT)
    )


def cell_rows(cells: Sequence[TrainCell], metric: str) -> Rows:
    """One row per run: its change (accuracy in % points), its place and edges on both axes."""
    ratios = edges(sorted({cell.ratio for cell in cells}), log=False)
    rates = edges(sorted({cell.learning_rate for cell in cells}), log=True)
    rows: Rows = []
    for cell in cells:
        scale = 1.0 if metric == "loss" else 100.0
        change = getattr(cell.change, f"{metric}_change")
        error = getattr(cell.change, f"{metric}_change_standard_error")
        rows.append(
            {
                "ratio": cell.ratio,
                "learning_rate": cell.learning_rate,
                "left": ratios[cell.ratio][0],
                "right": ratios[cell.ratio][1],
                "low": rates[cell.learning_rate][0],
                "high": rates[cell.learning_rate][1],
                "change": None if change is None else change * scale,
                "error": None if error is None else error * scale,
                "start": getattr(cell.change, f"{metric}_start") * scale,
                "text": "diverged" if change is None else _signed(change * scale, metric),
            }
        )
    return rows


def edges(values: Sequence[float], *, log: bool) -> dict[float, tuple[float, float]]:
    """Cell limits: halfway to the neighbours (on a log axis their geometric mean).

    Args:
        values: Ascending, distinct.
        log: Whether the axis is logarithmic; then all values are positive.
    """
    if log:
        if len(values) == 1:
            return {values[0]: (values[0] / 2, values[0] * 2)}
        between = [(a * b) ** 0.5 for a, b in pairwise(values)]
        limits = [values[0] ** 2 / between[0], *between, values[-1] ** 2 / between[-1]]
    else:
        if len(values) == 1:
            return {values[0]: (values[0] - 0.1, values[0] + 0.1)}
        between = [(a + b) / 2 for a, b in pairwise(values)]
        limits = [2 * values[0] - between[0], *between, 2 * values[-1] - between[-1]]
    return {value: (limits[i], limits[i + 1]) for i, value in enumerate(values)}


def _limit_of_colours(rows: Rows, metric: str) -> float:
    sign = -1.0 if metric == "loss" else 1.0
    changes = [row["change"] for row in rows if row["change"] is not None]
    better = [sign * change for change in changes if sign * change > 0]
    return max(better, default=max((abs(change) for change in changes), default=0.0)) or 1.0


def _axes(rows: Rows, overlay: Rows, below: str | None) -> tuple[alt.X, alt.Y]:
    answers = [row["eta_c"] for row in overlay if row["eta_c"]]
    low = min([row["low"] for row in rows] + answers)
    high = max([row["high"] for row in rows] + answers)
    left, right = min(row["left"] for row in rows), max(row["right"] for row in rows)
    x = alt.X(
        "ratio:Q",
        title=below,
        scale=alt.Scale(domain=[left, right], nice=False, zero=False),
        axis=alt.Axis(
            format="~g", grid=False, values=sorted({r["ratio"] for r in rows}), labelOverlap=True
        ),
    )
    y = alt.Y(
        "learning_rate:Q",
        title="learning rate",
        scale=alt.Scale(type="log", domain=[low, high], nice=False),
        axis=alt.Axis(
            format="~e",
            grid=False,
            values=sorted({row["learning_rate"] for row in rows}),
            labelOverlap=True,
        ),
    )
    return x, y


def _at(axis: Any, field: str) -> Any:
    other = axis.copy(deep=True)
    other.shorthand = f"{field}:Q"
    return other


def _rectangles(rows: Rows, x: alt.X, y: alt.Y) -> Any:
    tooltip = [
        alt.Tooltip("ratio:Q", format=".4g"),
        alt.Tooltip("learning_rate:Q", title="learning rate", format=".3~e"),
        alt.Tooltip("change:Q", format="+.4g"),
        alt.Tooltip("error:Q", title="standard error", format=".2g"),
        alt.Tooltip("start:Q", title="at the checkpoint", format=".4g"),
    ]
    return (
        drawing_of(rows)
        .mark_rect()
        .encode(x=_at(x, "left"), x2="right:Q", y=_at(y, "low"), y2="high:Q", tooltip=tooltip)
    )


def _numbers(rows: Rows, limit: float, x: alt.X, y: alt.Y) -> list[Any]:
    """The change in every cell; legible on its colour."""
    layers = []
    for bold in (True, False):
        for dark in (True, False):
            some = [row for row in rows if _is_bold(row) == bold and _is_pale(row, limit) == dark]
            if some:
                text = drawing_of(some).mark_text(
                    fontSize=10,
                    fontWeight="bold" if bold else "normal",
                    color=_DARK if dark else _LIGHT,
                )
                layers.append(text.encode(x=x, y=y, text="text:N"))
    return layers


def _is_bold(row: dict[str, Any]) -> bool:
    return bool(row["error"] is not None and abs(row["change"]) > 2 * row["error"])


def _is_pale(row: dict[str, Any], limit: float) -> bool:
    return row["change"] is not None and abs(row["change"]) < 0.6 * limit


def _overlay_rows(scan: MixScan, task: str) -> Rows:
    """The task's eta_c at each ratio of the scan (0: not descended), and the sweet spot."""
    rows: Rows = [
        {"ratio": point.ratio, "eta_c": point.eta_c_median, "what": "eta_c"}
        for point in scan.points
        if point.task == task and point.eta_c_median is not None
    ]
    spot = scan.sweet_spot
    if rows and spot is not None:
        rows.append({"ratio": spot.ratio, "eta_c": spot.eta_c, "what": "sweet spot"})
    return rows


def _overlay_layers(rows: Rows, x: alt.X, y: alt.Y) -> list[Any]:
    ink = {"stroke": INK["light"][0], "strokeWidth": 1.4}
    # Under the ink: it must show on a dark page too, where the axis reaches beyond the cells.
    casing = {"stroke": _SAME, "strokeWidth": 3.6}
    tooltip = [
        "what:N",
        alt.Tooltip("ratio:Q", format=".4g"),
        alt.Tooltip("eta_c:Q", format=".3~e"),
    ]
    places = {"x": x, "y": _at(y, "eta_c"), "tooltip": tooltip}
    layers = []
    curve = [r | {"eta_c": r["eta_c"] or None} for r in rows if r["what"] == "eta_c"]
    if any(row["eta_c"] for row in curve):
        for pen in (casing, ink):
            line = drawing_of(curve).mark_line(invalid="break-paths-show-domains", clip=True, **pen)
            layers.append(line.encode(x=x, y=_at(y, "eta_c")))
        dots = drawing_of([row for row in curve if row["eta_c"]])
        layers.append(dots.mark_point(size=30, fill=_SAME, opacity=1, **ink).encode(**places))
    hurt = [row for row in rows if row["eta_c"] == 0.0]
    if hurt:
        for pen in (casing, ink):
            cross = drawing_of(hurt).mark_point(
                shape="cross", size=70, filled=False, opacity=1, **pen
            )
            layers.append(cross.encode(x=x, y=alt.value(_HEIGHT - 8), tooltip=tooltip))
    spot = [row for row in rows if row["what"] == "sweet spot"]
    if spot:
        mark = drawing_of(spot).mark_point(shape="diamond", size=110, fill="#F0E442", opacity=1)
        layers.append(mark.encode(stroke=alt.value(INK["light"][0]), **places))
    return layers


def _subtitle(result: MixTrainUnitResult, with_scan: bool) -> list[str]:
    first, train = result.provenance, result.spec["train"]
    names = ", ".join(_clean(source["name"]) for source in result.spec["mixture"]["sources"])
    lines = [
        f"{first.num_parameters:,} parameters, {first.dtype}, moments: {first.moments}; mix of "
        f"{names}; {train['steps']} steps of AdamW at a constant learning rate",
        "change against the checkpoint: red worse, white the same, blue better; bold: more than "
        "two standard errors",
    ]
    if with_scan:
        lines.append(
            "from the scan: line η_c of the task, cross: hurt at once, diamond: sweet spot"
        )
    return lines


def _signed(value: float, metric: str) -> str:
    return f"{value:+.2f}" if metric == "loss" else f"{value:+.1f}"


def _clean(text: str) -> str:
    return NOT_XML.sub("", text)[:80]
