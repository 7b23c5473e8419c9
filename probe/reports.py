"""What the results of each kind of job are shown as: flat rows and a chart (torch-free)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from probe.result import UnitResult
from probe.result_continual import ContinualUnitResult
from probe.result_mix import MixUnitResult
from probe.result_train import MixTrainUnitResult
from probe.tables import COLUMNS, series_rows, to_csv, to_parquet
from probe.tables_continual import CONTINUAL_COLUMNS, continual_rows
from probe.tables_mix import MIX_COLUMNS, mix_rows
from probe.tables_train import TRAIN_COLUMNS, train_rows
from probe.unit_results import AnyUnitResult

if TYPE_CHECKING:
    import altair as alt

    from probe.chart_style import Theme


@dataclass(frozen=True, slots=True)
class LongForm:
    """Rows as `long_form` says, and the type of every column, also without rows."""

    rows: Sequence[Mapping[str, Any]]
    columns: Mapping[str, type]

    def csv(self) -> str:
        """As `probe.tables.to_csv`."""
        return to_csv(self.rows, self.columns)

    def parquet(self) -> bytes:
        """As `probe.tables.to_parquet`."""
        return to_parquet(self.rows, self.columns)


def long_form(kind: str, results: Sequence[AnyUnitResult]) -> LongForm:
    """Every search of a job's finished units; of a training grid, every run and task.

    Of continual learning, every run, task, window and layer.

    Args:
        kind: Of the job: it names the columns where there are no results yet.
        results: In unit order.
    """
    if kind == "mix_scan":
        return LongForm(mix_rows(mix_results(results)), MIX_COLUMNS)
    if kind == "mix_train":
        return LongForm(train_rows(train_results(results)), TRAIN_COLUMNS)
    if kind == "continual_learning":
        return LongForm(continual_rows(continual_results(results)), CONTINUAL_COLUMNS)
    return LongForm(series_rows(series_results(results)), COLUMNS)


def result_chart(results: Sequence[AnyUnitResult], theme: "Theme" = "light") -> "alt.VConcatChart":
    """The chart of a job's finished units, as its kind is drawn.

    Args:
        results: At least one.
        theme: Colours for a light or a dark page.

    Raises:
        ConfigError: `results` is empty.
    """
    # Imported here: altair takes a third of a second, which tables do not need.
    from probe.chart import series_chart
    from probe.chart_continual import continual_chart
    from probe.chart_mix import mix_chart
    from probe.chart_train import train_chart

    learned = continual_results(results)
    if learned:
        return continual_chart(learned, theme)
    runs = train_results(results)
    if runs:
        return train_chart(runs, theme)
    scans = mix_results(results)
    return mix_chart(scans, theme) if scans else series_chart(series_results(results), theme)


def mix_results(results: Sequence[AnyUnitResult]) -> list[MixUnitResult]:
    """Those of a mix scan."""
    return [result for result in results if isinstance(result, MixUnitResult)]


def train_results(results: Sequence[AnyUnitResult]) -> list[MixTrainUnitResult]:
    """Those of a training grid."""
    return [result for result in results if isinstance(result, MixTrainUnitResult)]


def continual_results(results: Sequence[AnyUnitResult]) -> list[ContinualUnitResult]:
    """Those of continual learning."""
    return [result for result in results if isinstance(result, ContinualUnitResult)]


def series_results(results: Sequence[AnyUnitResult]) -> list[UnitResult]:
    """Those of a checkpoint series."""
    return [result for result in results if isinstance(result, UnitResult)]
