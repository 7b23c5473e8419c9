"""Results of a mix scan as flat rows: one per search, or one per ratio and task (torch-free)."""

from collections.abc import Iterable
from typing import Any

from probe.mix_summary import summarise_scans
from probe.result_mix import MixMeasurement, MixUnitResult

Row = dict[str, Any]

# Column -> type, in the order written; see `probe.tables.COLUMNS`.
MIX_COLUMNS: dict[str, type] = {
    "unit_id": str,
    "unit_index": int,
    "step": int,
    "checkpoint": str,
    "revision": str,
    "ratio": float,
    "task": str,
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
    "duration_s": float,
    "varied": str,
    "gradients": str,
    "moments": str,
    "dtype": str,
    "device": str,
    "attention": str,
    "update_batch_sha256": str,
    "loss_batch_sha256": str,
    "spec_sha256": str,
}


def mix_rows(results: Iterable[MixUnitResult]) -> list[Row]:
    """One row per search, in the order of units and searches; keys are `MIX_COLUMNS`."""
    return [_row(result, m) for result in results for m in result.measurements]


def _row(result: MixUnitResult, measurement: MixMeasurement) -> Row:
    mixture = result.spec["mixture"]
    values = {
        **measurement.model_dump(mode="json", exclude={"trials", "shares"}),
        "update_batch_sha256": " ".join(measurement.update_batch_sha256),
        "unit_id": result.unit.unit_id,
        "unit_index": result.unit.index,
        "step": result.unit.checkpoint_ref.step,
        "checkpoint": result.unit.checkpoint_ref.location,
        "revision": result.unit.checkpoint_ref.revision,
        "varied": mixture["varied"] or mixture["sources"][0]["name"],
        "gradients": mixture["gradients"],
        "moments": result.provenance.moments,
        "dtype": result.provenance.dtype,
        "device": result.provenance.device,
        "attention": result.provenance.attention,
        "spec_sha256": result.provenance.spec_sha256,
    }
    return {column: values[column] for column in MIX_COLUMNS}


def mix_summary_rows(results: Iterable[MixUnitResult]) -> list[Row]:
    """One row per checkpoint, ratio and task: mean, standard error, bracket, outcomes."""
    return [
        {
            "checkpoint": scan.checkpoint,
            "step": scan.step,
            "ratio": point.ratio,
            "task": point.task,
            "lambda_c_mean": point.lambda_c_mean,
            "lambda_c_standard_error": point.lambda_c_standard_error,
            "lambda_c_lower": point.lambda_c_lower,
            "lambda_c_upper": point.lambda_c_upper,
            "slope_mean": point.slope_mean,
            "loss_at_zero": point.loss_at_zero,
            "num_repeats": point.num_repeats,
            "num_converged": point.num_converged,
            "no_answer": {k: n for k, n in point.outcomes.items() if k != "converged" and n},
            "num_forward_passes": point.num_forward_passes,
        }
        for scan in summarise_scans(results)
        for point in scan.points
    ]
