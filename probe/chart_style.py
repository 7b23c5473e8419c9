"""What all charts share: colours, fonts, log axes, marks, and their forms as JSON, SVG and PNG.

The pictures are drawn offline by vl-convert with the fonts it carries (torch-free).
"""

import copy
import math
import re
from typing import Any, Literal

import altair as alt
import vl_convert

from probe.line_search import SearchOutcome

Theme = Literal["light", "dark"]
Rows = list[dict[str, Any]]

WIDTH = 640
INK = {"light": ("#1B1F24", "#FFFFFF", "#E3E6EA"), "dark": ("#E6E8EB", "#14171C", "#30363D")}
# Okabe and Ito's colours and three more: told apart also by colour-blind readers.
PALETTE = {
    "light": (
        *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A6D00", "#56B4E9"),
        *("#5B3A9E", "#7A7A7A"),
    ),
    "dark": (
        *("#56B4E9", "#F0A030", "#3DD3A8", "#E9A3CB", "#F0E442", "#9CC9F0"),
        *("#B49AF0", "#B5B5B5"),
    ),
}
SHAPES = {
    SearchOutcome.NO_CROSSING: "triangle-up",
    SearchOutcome.NOT_A_DESCENT_DIRECTION: "cross",
    SearchOutcome.BUDGET_EXHAUSTED: "square",
}
# Characters XML 1.0 cannot hold, not even escaped.
NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_vega(chart: alt.VConcatChart) -> dict[str, Any]:
    """The chart as a Vega-Lite specification, its rows included."""
    spec: dict[str, Any] = chart.to_dict()
    return spec


def to_svg(chart: alt.VConcatChart) -> str:
    """The chart as an SVG document; needs no browser and no network. About 0.5 s."""
    return vl_convert.vegalite_to_svg(chart.to_dict(), allowed_base_urls=[])


def to_png(chart: alt.VConcatChart, *, scale: float = 2.0) -> bytes:
    """The chart as a PNG, `scale` pixels to a CSS pixel. About 0.6 s."""
    return vl_convert.vegalite_to_png(chart.to_dict(), scale=scale, allowed_base_urls=[])


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten in the range; the powers alone over many decades."""
    factors = (1, 2, 5) if high / low < 3e3 else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [v for e in exponents for f in factors if low <= (v := f * 10.0**e) <= high]
    if len(ticks) >= 2:
        return ticks
    # Within a factor of two or so, an axis without a number would say nothing.
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def drawing_of(rows: Rows) -> Any:
    """A chart of rows that travel inside it."""
    # Any: altair's mark and encode methods are untyped.
    return alt.Chart(alt.InlineData(values=rows))


def on_axis(y: alt.Y, field: str) -> alt.Y:
    """The same axis, another field."""
    other = copy.deepcopy(y)
    other.shorthand = f"{field}:Q"
    return other


def chart_config(theme: Theme) -> dict[str, Any]:
    """Colours and fonts of a light or a dark page."""
    ink, paper, grid = INK[theme]
    return {
        "background": paper,
        "font": "sans-serif",
        "view": {"stroke": None},
        "title": {
            "anchor": "start", "fontSize": 16, "color": ink, "subtitleColor": ink,
            "subtitleFontSize": 11, "offset": 12, "limit": WIDTH,
        },
        "axis": {
            "labelColor": ink, "titleColor": ink, "gridColor": grid, "domainColor": ink,
            "tickColor": ink, "labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal",
        },
        "legend": {"labelColor": ink, "titleColor": ink, "labelFontSize": 12},
    }  # fmt: skip
