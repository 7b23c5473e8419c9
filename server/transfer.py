"""Jobs from elsewhere: check that an exported one is whole and write it down as if it had run here.

DBOS hears nothing of it; its state is its closing event. Everything goes in by one transaction,
so a job is here with all its results and events, or not at all.
"""

import datetime as dt
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa

from probe.result import Plan
from probe.spec_load import parse_spec
from probe.unit_results import AnyUnitResult
from server import queue, tables
from server.ended_views import EndedViews
from server.errors import InvalidExportError, JobExistsError
from server.job_views import job_view
from server.store import SqlStore
from server.tables import events, job_labels, jobs, unit_results
from server.wire import TERMINAL, Event, JobView

_PAGE = 1000
_FIRST_YEAR, _LAST_YEAR = 1970, 9000


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job that has ended, with all that is known of it."""

    view: JobView
    plan: Plan
    results: Sequence[AnyUnitResult]
    events: Sequence[Event]

    def sha256(self) -> str:
        """Hash of its contents: equal where it ran and wherever it was imported to."""
        whole = {
            "view": self.view.model_dump(mode="json", exclude={"imported_at"}),
            "plan": self.plan.model_dump(mode="json"),
            "results": [result.model_dump(mode="json") for result in self.results],
            "events": [event.model_dump(mode="json") for event in self.events],
        }
        text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def check_record(record: JobRecord) -> None:
    """Refuse what no server can have exported: every part must say the same as the others.

    Raises:
        InvalidExportError: With the part and what it should be.
        SpecError: The spec is none that this program knows.
    """
    view, plan = record.view, record.plan
    if view.status not in TERMINAL:
        raise InvalidExportError(f"job.json: the job is {view.status}, only ended ones are taken")
    spec = parse_spec(view.spec)
    if "webhook" in view.spec:  # perhaps a secret, and it would be shown
        raise InvalidExportError("job.json: a webhook is never exported, found one in the spec")
    _same("kind", view.kind, spec.kind)
    _same("name", view.name, spec.name)
    _same("labels", view.labels, spec.labels)
    _same("priority", view.priority, spec.priority)
    _same("time_limit_s", view.time_limit_s, spec.time_limit_s)
    _same("queue", view.queue, queue.queue_for(view.spec))
    _same("plan.kind", plan.kind, view.kind)
    _same("plan.spec", plan.spec, view.spec)
    _same("plan.spec_sha256", plan.spec_sha256, view.spec_sha256)
    _same("plan.num_forward_passes", plan.num_forward_passes, view.expected_forward_passes)
    _check_times(view)
    _check_results(record)
    _check_events(record)
    _check_row(record)


def _same(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        shown, wanted = (str(value)[:100] for value in (found, expected))
        raise InvalidExportError(f"{what} is {shown!r}, but the rest of the export says {wanted!r}")


def _check_times(view: JobView) -> None:
    if view.finished_at is None:
        raise InvalidExportError("job.json: a job that has ended has a finished_at")
    moments = [m for m in (view.created_at, view.started_at, view.finished_at) if m is not None]
    _check_readable("job.json", moments)
    if moments != sorted(moments):
        raise InvalidExportError("job.json: created_at, started_at, finished_at are out of order")


def _check_readable(name: str, moments: Iterable[dt.datetime]) -> None:
    for moment in moments:
        if moment.tzinfo is None:
            raise InvalidExportError(f"{name}: times need a zone")
        # Beyond, in another zone, are times that can be written and not read again.
        if not _FIRST_YEAR <= moment.year <= _LAST_YEAR:
            raise InvalidExportError(
                f"{name}: {moment.isoformat()} is not in the years {_FIRST_YEAR} to {_LAST_YEAR}"
            )


def _check_results(record: JobRecord) -> None:
    view, units = record.view, record.plan.units
    _same("unit indices of the plan", [unit.index for unit in units], list(range(len(units))))
    indices = [result.unit.index for result in record.results]
    if indices != sorted(set(indices)) or any(not 0 <= i < len(units) for i in indices):
        raise InvalidExportError("results.json: units must be the plan's, each once, in order")
    for result in record.results:
        _same("unit of a result", result.unit.unit_id, units[result.unit.index].unit_id)
        _same("kind of a result", result.kind, view.kind)
    _same("num_units", view.num_units, len(units))
    _same("num_units_finished", view.num_units_finished, len(indices))
    without = sum(not result.has_every_answer for result in record.results)
    _same("num_units_without_answer", view.num_units_without_answer, without)
    passes = sum(result.num_forward_passes for result in record.results)
    _same("num_forward_passes", view.num_forward_passes, passes)
    if view.status == "succeeded":
        _same("num_units_finished of a job that succeeded", len(indices), len(units))


def _check_events(record: JobRecord) -> None:
    found = record.events
    _same("event ids", [event.id for event in found], list(range(1, len(found) + 1)))
    closing = [event.id for event in found if event.type.removeprefix("job.") in TERMINAL]
    _same("closing events", closing, [len(found)])
    _same("the last event", found[-1].type, f"job.{record.view.status}")
    _check_readable("events.jsonl", [event.at for event in found])


def _check_row(record: JobRecord) -> None:
    """What is written must fit its columns, and read again be what was sent."""
    row = _job_row(record)
    for column in jobs.c:
        value, limit = row.get(column.name), getattr(column.type, "length", None)
        if limit is not None and isinstance(value, str) and len(value) > limit:
            raise InvalidExportError(f"{column.name} has {len(value)} characters, at most {limit}")
    nothing = dict.fromkeys(("dbos_status", "completed_at", "recovery_attempts", "executor_id"))
    shown = job_view(SimpleNamespace(**row, **nothing, imported_at=0))
    for name, value in shown:
        if name != "imported_at":
            _same(name, getattr(record.view, name), value)


def read_record(store: SqlStore, job_id: str) -> JobRecord | None:
    """A job of this store as it would be exported; None where there is none."""
    view, plan = store.get_job(job_id), store.get_plan(job_id)
    if view is None or plan is None:
        return None
    found: list[Event] = []
    while page := store.events_after(job_id, found[-1].id if found else 0, _PAGE):
        found += page
    return JobRecord(view, plan, store.unit_results(job_id), found)


def import_job(store: SqlStore, record: JobRecord) -> tuple[JobView, bool]:
    """Write a checked record; (view, True), or (view, False) where the same job is here already.

    Raises:
        JobExistsError: Another job, or another state of it, has the id.
    """
    job_id = record.view.id
    with store.engine.begin() as connection:
        created = _insert(store.engine, connection, record)
    if not created:
        here = read_record(store, job_id)
        if here is None or here.sha256() != record.sha256():
            raise JobExistsError(
                f"job {job_id} is here already, with other contents: remove it first, or import "
                "into another database"
            )
    view = store.get_job(job_id)
    assert view is not None
    return view, created


def _insert(engine: sa.Engine, connection: sa.Connection, record: JobRecord) -> bool:
    job_id, now = record.view.id, tables.now_ms(engine)
    row = _job_row(record) | {"imported_at": now}
    statement = queue.insert(engine, jobs).values(**row).on_conflict_do_nothing()
    if connection.execute(statement.returning(jobs.c.id)).first() is None:
        return False
    recorded = {
        e.data["index"]: e.at
        for e in record.events
        if e.type == "unit.finished" and isinstance(e.data.get("index"), int)
    }
    units = [
        {
            "job_id": job_id,
            "unit_index": result.unit.index,
            "has_every_answer": result.has_every_answer,
            "num_forward_passes": result.num_forward_passes,
            "recorded_at": _ms(recorded.get(result.unit.index, record.events[-1].at)),
            "result": result.model_dump(mode="json"),
        }
        for result in record.results
    ]
    happened = [
        {"job_id": job_id, "seq": e.id, "type": e.type, "at": _ms(e.at), "data": e.data}
        for e in record.events
    ]
    labels = [{"job_id": job_id, "key": k, "value": v} for k, v in record.view.labels.items()]
    for table, rows in ((job_labels, labels), (unit_results, units), (events, happened)):
        if rows:
            connection.execute(sa.insert(table), rows)
    EndedViews(engine).write(connection, job_id)
    return True


def _job_row(record: JobRecord) -> dict[str, Any]:
    view, error = record.view, record.view.error
    assert view.finished_at is not None
    return {
        "id": view.id,
        "kind": view.kind,
        "name": view.name,
        "labels": view.labels,
        "spec": view.spec,
        "spec_sha256": view.spec_sha256,
        "plan": record.plan.model_dump(mode="json"),
        "num_units": view.num_units,
        "expected_forward_passes": view.expected_forward_passes,
        "body_sha256": record.sha256(),
        "created_at": _ms(view.created_at),
        "started_at": None if view.started_at is None else _ms(view.started_at),
        "error_code": None if error is None else error.code,
        "error_message": None if error is None else error.message,
        "error_unit_id": None if error is None else error.unit_id,
        "num_events": len(record.events),
        "end_event": f"job.{view.status}",
        "ended_at": _ms(view.finished_at),
        "num_finished": view.num_units_finished,
        "num_without_answer": view.num_units_without_answer,
        "num_forward_passes": view.num_forward_passes,
        "queue": view.queue,
        "submitted_by": view.submitted_by,
    }


def _ms(moment: dt.datetime) -> int:
    # By integers: a float of seconds is a millisecond off now and then.
    return (moment - dt.datetime.fromtimestamp(0, dt.UTC)) // dt.timedelta(milliseconds=1)
