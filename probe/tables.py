"""Results as flat rows: CSV, Parquet, and what a terminal table prints (torch-free).

The long form holds one row per line search, so that nothing a job measured is lost in an
average; the summary form holds one row per checkpoint and loss batch. A quantity without an
answer stays empty beside the outcome that says why. Charts are in `probe/chart.py`.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from probe.result import Measurement, UnitResult

Row = dict[str, Any]

# Column -> type, in the order written. The Parquet schema comes from here, so that a column
# that happens to be empty (no learning rate known, no answer anywhere) keeps its type.
COLUMNS: dict[str, type] = {
    "unit_id": str,
    "unit_index": int,
    "step": int,
    "checkpoint": str,
    "revision": str,
    "loss_batch": str,
    "repeat": int,
    "outcome": str,
    "lambda_c": float,
    "eta_c": float,
    "eta_lower": float,
    "eta_upper": float,
    "eta_interpolated": float,
    "loss_at_zero": float,
    "slope": float,
    "num_forward_passes": int,
    "num_extra_sign_changes": int,
    "loss_resolution": float,
    "learning_rate": float,
    "stability_threshold": float,
    "duration_s": float,
    "moments": str,
    "dtype": str,
    "device": str,
    "attention": str,
    "update_batch_sha256": str,
    "loss_batch_sha256": str,
    "spec_sha256": str,
}

# A spreadsheet runs a cell that begins with one of these as a formula.
_FORMULA_START = ("=", "+", "-", "@", "\t", "\r")


def series_rows(results: Iterable[UnitResult]) -> list[Row]:
    """One row per measurement, in the order of units and measurements; keys are `COLUMNS`."""
    return [_measurement_row(result, m) for result in results for m in result.measurements]


def _measurement_row(result: UnitResult, measurement: Measurement) -> Row:
    values = {
        **measurement.model_dump(mode="json", exclude={"trials"}),
        "unit_id": result.unit.unit_id,
        "unit_index": result.unit.index,
        "step": result.unit.checkpoint_ref.step,
        "checkpoint": result.unit.checkpoint_ref.location,
        "revision": result.unit.checkpoint_ref.revision,
        "learning_rate": result.unit.learning_rate,
        "stability_threshold": result.stability_threshold,
        "moments": result.provenance.moments,
        "dtype": result.provenance.dtype,
        "device": result.provenance.device,
        "attention": result.provenance.attention,
        "spec_sha256": result.provenance.spec_sha256,
    }
    return {column: values[column] for column in COLUMNS}


def summary_rows(results: Iterable[UnitResult]) -> list[Row]:
    """One row per checkpoint and loss batch: mean, standard error, bracket, outcomes, cost.

    `no_answer` counts the repeats that did not converge, by outcome, as in
    `{"no_crossing": 1}`; it is empty where every repeat has an answer.
    """
    return [
        {
            "unit_id": result.unit.unit_id,
            "label": result.unit.checkpoint_ref.label,
            "step": result.unit.checkpoint_ref.step,
            "loss_batch": summary.loss_batch,
            "loss_mean": summary.loss_mean,
            "lambda_c_mean": summary.lambda_c_mean,
            "lambda_c_standard_error": summary.lambda_c_standard_error,
            "lambda_c_lower": summary.lambda_c_lower,
            "lambda_c_upper": summary.lambda_c_upper,
            "num_repeats": summary.num_repeats,
            "num_converged": summary.num_converged,
            "learning_rate": result.unit.learning_rate,
            "stability_threshold": result.stability_threshold,
            "no_answer": {k: n for k, n in summary.outcomes.items() if k != "converged" and n},
            "num_forward_passes": summary.num_forward_passes,
            "duration_s": result.duration_s,
        }
        for result in results
        for summary in result.summaries
    ]


def to_csv(rows: Sequence[Mapping[str, Any]], columns: Iterable[str] = COLUMNS) -> str:
    """RFC 4180 text with a header line; `None` is an empty cell, floats keep every digit.

    Text that a spreadsheet would run as a formula gets a leading apostrophe; numbers do not.
    The columns are those of the first row, or `columns` when there is none.
    """
    columns = list(rows[0]) if rows else list(columns)
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(columns)
    writer.writerows([_cell(row[column]) for column in columns] for row in rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, Mapping):
        value = "; ".join(f"{key}: {count}" for key, count in value.items())
    if isinstance(value, str) and value.startswith(_FORMULA_START):
        return "'" + value
    return value


def to_parquet(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, type] = COLUMNS) -> bytes:
    """A Parquet file of long-form rows, typed by `columns` also where a column is all empty."""
    # Imported here: it takes 0.3 s, and only this function needs it.
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    types = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), out)
    return out.getvalue()
