"""Results of continual learning as flat rows: one per run, task, window and layer (torch-free).

What a run has once (`RUN_SIGNALS`, and what is known of a task as a whole) stands in the rows of
the layer `network` and is empty in the others. A task that was not measured, because its run had
diverged, keeps one such row.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from probe.continual_summary import BOUNDS, summarise_continual
from probe.result_continual import (
    LAYER_SIGNALS,
    RUN_SIGNALS,
    ContinualUnitResult,
    RunRecord,
    RunTask,
)

Row = dict[str, Any]
NETWORK = "network"

_TASK_COLUMNS: dict[str, type] = {
    "task_accuracy": float,
    "task_accuracy_end": float,
    "task_loss": float,
    "task_loss_end": float,
    **{f"violation_share_{bound}": float for bound in BOUNDS},
}
# Column -> type, in the order written; see `probe.tables.COLUMNS`.
CONTINUAL_COLUMNS: dict[str, type] = {
    "unit_id": str,
    "unit_index": int,
    "method": str,
    "control": str,
    "seed": int,
    "task": int,
    "outcome": str,
    "window": int,
    "last_step": int,
    "num_steps_per_task": int,
    "layer": str,
    **dict.fromkeys(LAYER_SIGNALS, float),
    **dict.fromkeys(RUN_SIGNALS, float),
    **_TASK_COLUMNS,
    "dtype": str,
    "device": str,
    "spec_sha256": str,
}


def continual_rows(results: Iterable[ContinualUnitResult]) -> list[Row]:
    """One row per run, task, window and layer, in the order of units; keys: `CONTINUAL_COLUMNS`.

    Cost: a figure of 27 runs, 40 tasks, 10 windows and 3 layers has 43,200 rows.
    """
    return [
        {column: row.get(column) for column in CONTINUAL_COLUMNS}
        for result in results
        for record in result.runs
        for task in record.tasks
        for row in _task_rows(result, record, task)
    ]


def _task_rows(result: ContinualUnitResult, record: RunRecord, task: RunTask) -> Iterator[Row]:
    base: Row = {
        "unit_id": result.unit.unit_id,
        "unit_index": result.unit.index,
        "method": record.run.method,
        "control": record.run.control,
        "seed": record.run.seed,
        "task": task.task,
        "outcome": task.outcome,
        "num_steps_per_task": result.num_steps_per_task,
        "dtype": result.provenance.dtype,
        "device": result.provenance.device,
        "spec_sha256": result.provenance.spec_sha256,
    }
    whole = _whole_task(task)
    windows = task.windows
    if not windows.last_step:
        yield base | {"layer": NETWORK} | whole
    for window, last_step in enumerate(windows.last_step):
        for number, layer in enumerate(result.layer_names):
            row = base | {"window": window, "last_step": last_step, "layer": layer}
            row |= {
                name: values[number][window]
                for name, values in windows.layers.items()
                if values  # without a measurement there are no layers
            }
            if layer == NETWORK:
                row |= {name: values[window] for name, values in windows.runs.items()} | whole
            yield row


def _whole_task(task: RunTask) -> Row:
    shares = task.violation_share or {}
    return {
        "task_accuracy": task.accuracy,
        "task_accuracy_end": task.accuracy_end,
        "task_loss": task.loss,
        "task_loss_end": task.loss_end,
        **{f"violation_share_{bound}": shares.get(bound) for bound in BOUNDS},
    }


def continual_summary_rows(results: Iterable[ContinualUnitResult]) -> list[Row]:
    """One row per method and control: accuracies over the seeds, and what predicts them."""
    summary = summarise_continual(results)
    return [
        {
            "method": curve.method,
            "control": curve.control,
            "num_runs": curve.num_runs,
            "num_diverged": curve.num_diverged,
            "num_tasks": curve.num_tasks,
            **{
                f"{part}{suffix}": value
                for part, over in (
                    ("accuracy_first", curve.first),
                    ("accuracy_last", curve.last),
                    ("accuracy", curve.accuracy),
                )
                for suffix, value in (("", over.mean), ("_standard_error", over.standard_error))
            },
            **{
                f"{name}_{bound}": getattr(curve.correlations[bound], name)
                for bound in BOUNDS
                for name in ("pearson", "spearman")
            },
        }
        for curve in (summary.curves if summary else [])
    ]
