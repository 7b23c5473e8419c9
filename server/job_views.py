"""How rows become what is sent: the query behind every `JobView`, and the view of one row."""

import datetime as dt
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from probe.continual_summary import summarise_stretch
from probe.mix_summary import summarise_unit
from probe.result_continual import ContinualUnitResult
from probe.result_mix import MixUnitResult
from probe.result_train import MixTrainUnitResult
from probe.spec_base import DEFAULT_PRIORITY
from probe.train_summary import summarise_run
from probe.unit_results import AnyUnitResult
from server import queue
from server.tables import jobs, unit_results
from server.wire import JobError, JobStatus, JobView


def _of_units(aggregate: Any) -> sa.ScalarSelect[Any]:
    # Correlated, so only the units of the jobs on the page are read, by their key.
    return sa.select(aggregate).where(unit_results.c.job_id == jobs.c.id).scalar_subquery()


def _sum(values: Any) -> sa.ColumnElement[int]:
    return sa.func.coalesce(sa.func.sum(values), 0)


# A job's finished units, summed up; once it has ended the sums stand in its own row.
UNIT_TOTALS: dict[str, sa.ScalarSelect[Any]] = {
    "num_finished": _of_units(sa.func.count()),
    "num_without_answer": _of_units(_sum(sa.case((unit_results.c.has_every_answer, 0), else_=1))),
    "num_forward_passes": _of_units(_sum(unit_results.c.num_forward_passes)),
}


def job_views(workflows: sa.Table) -> sa.Select[Any]:
    """Every job beside its row of DBOS's `workflow_status` and the counts of its finished units."""
    # Without the plan, the largest, and not needed here.
    columns = [c for c in jobs.c if c.name not in ("plan", *UNIT_TOTALS)]
    return sa.select(
        *columns,
        workflows.c.status.label("dbos_status"),
        workflows.c.completed_at.label("completed_at"),
        workflows.c.recovery_attempts.label("recovery_attempts"),
        workflows.c.executor_id.label("executor_id"),
        *(sa.func.coalesce(jobs.c[name], total).label(name) for name, total in UNIT_TOTALS.items()),
    ).outerjoin(workflows, workflows.c.workflow_uuid == jobs.c.id)  # imported jobs have none


def _status(row: Any) -> JobStatus:
    if row.imported_at is None and row.dbos_status is not None:
        return queue.job_status(row.dbos_status)
    # DBOS has no row of it: imported, or removed by whoever tidied up DBOS's tables by hand.
    if row.end_event is None:
        return "failed"
    status: JobStatus = row.end_event.removeprefix("job.")
    return status


def time_of(ms: int) -> dt.datetime:
    """The moment `ms` milliseconds after the epoch, UTC."""
    return dt.datetime.fromtimestamp(ms / 1000, dt.UTC)


def finished_data(result: AnyUnitResult) -> dict[str, Any]:
    """What `unit.finished` tells: enough for a table row, not every trial."""
    common = {
        "kind": result.kind,
        "unit_id": result.unit.unit_id,
        "index": result.unit.index,
        "step": None if result.unit.checkpoint is None else result.unit.checkpoint.step,
        "num_forward_passes": result.num_forward_passes,
        "num_tokens": result.num_forward_passes * _tokens_per_pass(result.spec),
        "duration_s": result.duration_s,
        "memory_bytes": result.memory_bytes,
    }
    if isinstance(result, MixUnitResult):
        return common | {"scan": summarise_unit(result).model_dump(mode="json")}
    if isinstance(result, MixTrainUnitResult):
        return common | {"run": summarise_run(result).model_dump(mode="json")}
    if isinstance(result, ContinualUnitResult):
        return common | {"stretch": summarise_stretch(result).model_dump(mode="json")}
    return common | {
        "stability_threshold": result.stability_threshold,
        "summaries": [summary.model_dump(mode="json") for summary in result.summaries],
    }


def _tokens_per_pass(spec: Mapping[str, Any]) -> int:
    """Of the largest batch a loss is taken on, as a plan counts them; 0 where there is no text."""
    batches = spec.get("batches") or {}
    sizes = [batches.get(name) or 0 for name in ("batch_sequences", "held_out_sequences")]
    sizes += [task.get("sequences") or 0 for task in spec.get("eval_tasks") or ()]
    return max(sizes) * int(batches.get("sequence_length") or 0)


def _job_error(row: Any) -> JobError | None:
    if _status(row) != "failed":
        return None
    if row.imported_at is None and row.dbos_status is None and row.end_event is None:
        return JobError(
            code="job_lost",
            message="the queue's row of this job has been removed from the database, and with it "
            "what state it was in; submit it again",
        )
    # First: what is noted beside it is of an earlier try, which was not what the job failed of.
    if row.dbos_status == queue.CRASH_LOOP:
        return JobError(
            code="worker_crash_loop",
            message=f"the job was started {row.recovery_attempts} times and its worker died each "
            "time before a unit was finished; see the worker's log",
        )
    if row.error_code is not None:
        return JobError(code=row.error_code, message=row.error_message, unit_id=row.error_unit_id)
    return JobError(code="internal_error", message="the worker's log tells what happened")


def _finished_at(row: Any) -> dt.datetime | None:
    if row.imported_at is not None or row.dbos_status is None:
        return None if row.ended_at is None else time_of(row.ended_at)
    if row.completed_at is None:
        return None
    # On SQLite DBOS's clock counts whole seconds; the closing event, written after it, tells the
    # rest unless it came late.
    exact = min(row.ended_at or row.completed_at, row.completed_at + 999)
    return time_of(max(exact, row.started_at or row.created_at))


def job_view(row: Any) -> JobView:
    """One row of `job_views` as it is sent."""
    status = _status(row)
    return JobView(
        id=row.id,
        kind=row.kind,
        name=row.name,
        labels=row.labels,
        status=status,
        queue=row.queue,
        priority=row.spec.get("priority", DEFAULT_PRIORITY),
        time_limit_s=row.spec.get("time_limit_s"),
        submitted_by=row.submitted_by,
        worker=row.executor_id if status == "running" else None,
        imported_at=None if row.imported_at is None else time_of(row.imported_at),
        created_at=time_of(row.created_at),
        started_at=None if row.started_at is None else time_of(row.started_at),
        finished_at=_finished_at(row),
        num_units=row.num_units,
        num_units_finished=row.num_finished,
        num_units_without_answer=row.num_without_answer,
        num_forward_passes=row.num_forward_passes,
        expected_forward_passes=row.expected_forward_passes,
        error=_job_error(row),
        spec=row.spec,
        spec_sha256=row.spec_sha256,
    )
