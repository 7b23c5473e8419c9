"""Results of a training grid as flat rows: one per run and task (torch-free)."""

from collections.abc import Iterable
from typing import Any

from probe.result_train import MixTrainUnitResult, TaskChange
from probe.train_summary import summarise_training

Row = dict[str, Any]

# Column -> type, in the order written; see `probe.tables.COLUMNS`.
TRAIN_COLUMNS: dict[str, type] = {
    "unit_id": str,
    "unit_index": int,
    "step": int,
    "checkpoint": str,
    "revision": str,
    "ratio": float,
    "learning_rate": float,
    "task": str,
    "outcome": str,
    "num_steps": int,
    "loss_start": float,
    "loss_end": float,
    "loss_change": float,
    "loss_change_standard_error": float,
    "accuracy_kind": str,
    "accuracy_count": int,
    "accuracy_chance": float,
    "accuracy_start": float,
    "accuracy_end": float,
    "accuracy_change": float,
    "accuracy_change_standard_error": float,
    "duration_s": float,
    "varied": str,
    "moments": str,
    "dtype": str,
    "device": str,
    "attention": str,
    "loss_batch_sha256": str,
    "first_batch_sha256": str,
    "spec_sha256": str,
}


def train_rows(results: Iterable[MixTrainUnitResult]) -> list[Row]:
    """One row per run and task, in the order of units and tasks; keys are `TRAIN_COLUMNS`."""
    return [_row(result, change) for result in results for change in result.tasks]


def _row(result: MixTrainUnitResult, change: TaskChange) -> Row:
    mixture = result.spec["mixture"]
    values = {
        **change.model_dump(mode="json"),
        "unit_id": result.unit.unit_id,
        "unit_index": result.unit.index,
        "step": result.unit.checkpoint_ref.step,
        "checkpoint": result.unit.checkpoint_ref.location,
        "revision": result.unit.checkpoint_ref.revision,
        "ratio": result.ratio,
        "learning_rate": result.learning_rate,
        "outcome": result.outcome,
        "num_steps": result.num_steps,
        "duration_s": result.duration_s,
        "varied": mixture["varied"] or mixture["sources"][0]["name"],
        "moments": result.provenance.moments,
        "dtype": result.provenance.dtype,
        "device": result.provenance.device,
        "attention": result.provenance.attention,
        "first_batch_sha256": result.first_batch_sha256,
        "spec_sha256": result.provenance.spec_sha256,
    }
    return {column: values[column] for column in TRAIN_COLUMNS}


def train_summary_rows(results: Iterable[MixTrainUnitResult]) -> list[Row]:
    """One row per checkpoint, ratio, learning rate and task: both changes with their errors."""
    return [
        {
            "checkpoint": table.checkpoint,
            "step": table.step,
            "ratio": cell.ratio,
            "learning_rate": cell.learning_rate,
            "task": cell.change.task,
            "outcome": cell.outcome,
            "loss_start": cell.change.loss_start,
            "loss_change": cell.change.loss_change,
            "loss_change_standard_error": cell.change.loss_change_standard_error,
            "accuracy_kind": cell.change.accuracy_kind,
            "accuracy_start": cell.change.accuracy_start,
            "accuracy_change": cell.change.accuracy_change,
            "accuracy_change_standard_error": cell.change.accuracy_change_standard_error,
        }
        for table in summarise_training(results)
        for cell in table.cells
    ]
