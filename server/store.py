"""Our own tables beside DBOS's, in the same database: jobs, unit results, events, workers.

DBOS's `workflow_status` is the one truth about a job's state; this module joins it in and never
keeps a second copy. Unit results are keyed (job_id, unit_index): the first one recorded stays.
SQLite (WAL) by default, Postgres by the same code.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Unpack

import sqlalchemy as sa
from prometheus_client import CollectorRegistry

from probe.result import Plan
from probe.spec_base import DEFAULT_PRIORITY
from probe.unit_results import AnyUnitResult, parse_result
from server import queue, tables, tracing, webhooks
from server.ended_views import EndedViews
from server.errors import IdempotencyConflictError
from server.event_reads import EventReads
from server.fence import require_owner
from server.job_ids import new_job_id
from server.job_reads import JobReads
from server.job_views import UNIT_TOTALS, finished_data, job_view, job_views, time_of
from server.metrics import ServiceMetrics
from server.queue_position import Forecast
from server.readiness import look
from server.store_protocol import JobFilters, JobOrigin
from server.store_protocol import Store as Store
from server.tables import events, job_labels, jobs, unit_results, workers
from server.wire import TERMINAL, Event, EventType, JobError, JobView, Readiness, WorkerView


class SqlStore:
    """The `Store` on SQLite or Postgres. Making one creates what is missing in the database."""

    def __init__(self, database_url: str, *, worker_stale_s: float = 60.0) -> None:
        self.engine = queue.create_engine(database_url)
        self._worker_stale_ms = int(worker_stale_s * 1000)
        self._workflows = queue.workflow_status_table(self.engine)
        self._now = tables.now_ms(self.engine)
        self._count, self._count_and_close = _count_event(self._now)
        self._ended_views = EndedViews(self.engine)
        self._reading = queue.reading_engine(self.engine)
        self._event_reads = EventReads(self._reading, self.settle)
        self._reads = JobReads(self._reading, Forecast(self._reading, worker_stale_s))
        try:
            self._revision = tables.create_tables(self.engine)
            self._client = queue.make_client(self.engine)
        except BaseException:
            self.engine.dispose()  # nobody else will: there is no store to close
            raise

    def close(self) -> None:
        """Give the connections back."""
        self._client.destroy()
        self._reading.dispose()
        self.engine.dispose()

    # --- jobs

    def create_job(
        self,
        *,
        plan: Plan,
        idempotency_key: str | None,
        body_sha256: str,
        **origin: Unpack[JobOrigin],
    ) -> tuple[JobView, bool]:
        job_id = new_job_id()
        with self.engine.begin() as connection:
            created = self._insert_job(
                connection, job_id, plan, idempotency_key, body_sha256, origin
            )
            if created:
                queue.enqueue(
                    self._client,
                    connection,
                    job_id=job_id,
                    queue=queue.queue_for(plan.spec),
                    unit_ids=[unit.unit_id for unit in plan.units],
                    priority=plan.spec.get("priority", DEFAULT_PRIORITY),
                )
        if created or idempotency_key is None:
            view = self.get_job(job_id)
        else:
            view = self.earlier_job(idempotency_key, body_sha256)
        assert view is not None
        return view, created

    def _insert_job(
        self,
        connection: sa.Connection,
        job_id: str,
        plan: Plan,
        idempotency_key: str | None,
        body_sha256: str,
        origin: JobOrigin,
    ) -> bool:
        labels: dict[str, str] = plan.spec.get("labels", {})
        now = connection.scalar(sa.select(self._now))
        inserted = connection.execute(
            queue.insert(self.engine, jobs)
            .values(
                id=job_id,
                kind=plan.kind,
                name=plan.spec["name"],
                labels=labels,
                spec=plan.spec,
                spec_sha256=plan.spec_sha256,
                plan=plan.model_dump(mode="json"),
                num_units=len(plan.units),
                expected_forward_passes=plan.num_forward_passes,
                queue=queue.queue_for(plan.spec),
                idempotency_key=idempotency_key,
                body_sha256=body_sha256,
                created_at=now,
                num_events=0,
                traceparent=tracing.current_traceparent(),
                **origin,
            )
            .on_conflict_do_nothing(index_elements=["idempotency_key"])
            .returning(jobs.c.id)
        ).first()
        if inserted is None:
            return False
        if labels:
            rows = [{"job_id": job_id, "key": k, "value": v} for k, v in labels.items()]
            connection.execute(sa.insert(job_labels), rows)
        self._append(connection, job_id, "job.queued", {})
        return True

    def earlier_job(self, idempotency_key: str, body_sha256: str) -> JobView | None:
        query = sa.select(jobs.c.id, jobs.c.body_sha256)
        query = query.where(jobs.c.idempotency_key == idempotency_key)
        with self.engine.connect() as connection:
            found = connection.execute(query).first()
        if found is None:
            return None
        if found.body_sha256 != body_sha256:
            raise IdempotencyConflictError(
                f"Idempotency-Key {idempotency_key!r} was used for {found.id} with another body; "
                "send the same body again, or a new key"
            )
        return self.get_job(found.id)

    def get_job(self, job_id: str) -> JobView | None:
        return self._reads.get(job_id)

    def get_jobs_json(self, job_ids: Sequence[str]) -> dict[str, bytes]:
        return self._reads.get_json(job_ids)

    def list_jobs(
        self, *, after: str | None = None, limit: int = 50, **filters: Unpack[JobFilters]
    ) -> tuple[list[JobView], bool]:
        return self._reads.page(filters, after, limit)

    def list_jobs_json(
        self, *, after: str | None = None, limit: int = 50, **filters: Unpack[JobFilters]
    ) -> bytes:
        return self._reads.page_json(filters, after, limit)

    def count_jobs(self) -> dict[str, int]:
        return self._reads.count_by_status()

    def cancel_job(self, job_id: str) -> JobView | None:
        view = self.get_job(job_id)
        if view is None or view.status in TERMINAL:
            return view
        self._client.cancel_workflow(job_id)
        self.settle(job_id)
        return self.get_job(job_id)

    def get_plan(self, job_id: str) -> Plan | None:
        with self.engine.connect() as connection:
            plan = connection.scalar(sa.select(jobs.c.plan).where(jobs.c.id == job_id))
        return None if plan is None else Plan.model_validate(plan)

    def traceparent(self, job_id: str) -> str | None:
        """Of the request that made the job, where it was traced."""
        query = sa.select(jobs.c.traceparent).where(jobs.c.id == job_id)
        with self.engine.connect() as connection:
            found: str | None = connection.scalar(query)
        return found

    def mark_running(self, job_id: str, worker: str, owner: str | None = None) -> None:
        """Note that a worker has begun with a job, for the first time or again."""
        with self._writing(job_id, owner) as connection:
            connection.execute(
                sa.update(jobs)
                .where(jobs.c.id == job_id)
                .values(started_at=sa.func.coalesce(jobs.c.started_at, self._now))
            )
            self._append(connection, job_id, "job.running", {"worker": worker})

    def record_error(self, job_id: str, error: JobError, owner: str | None = None) -> None:
        """Keep the last failure; it is shown once the job itself has failed."""
        with self._writing(job_id, owner) as connection:
            connection.execute(
                sa.update(jobs)
                .where(jobs.c.id == job_id)
                .values(
                    error_code=error.code,
                    error_message=error.message,
                    error_unit_id=error.unit_id,
                )
            )

    # --- unit results

    def record_unit(self, job_id: str, result: AnyUnitResult, owner: str | None = None) -> bool:
        unit = result.unit
        with self._writing(job_id, owner) as connection:
            inserted = connection.execute(
                queue.insert(self.engine, unit_results)
                .values(
                    job_id=job_id,
                    unit_index=unit.index,
                    has_every_answer=result.has_every_answer,
                    num_forward_passes=result.num_forward_passes,
                    recorded_at=self._now,
                    result=result.model_dump(mode="json"),
                )
                .on_conflict_do_nothing()
                .returning(unit_results.c.unit_index)
            ).first()
            if inserted is None:
                return False
            connection.execute(
                sa.update(jobs)
                .where(jobs.c.id == job_id)
                .values(error_code=None, error_message=None, error_unit_id=None)
            )
            # Only a job that dies again and again without finishing a unit is a crash loop.
            connection.execute(
                sa.update(self._workflows)
                .where(self._workflows.c.workflow_uuid == job_id)
                .where(self._workflows.c.recovery_attempts > 1)
                .values(recovery_attempts=1)
            )
            self._append(connection, job_id, "unit.finished", finished_data(result))
        return True

    def unit_result(self, job_id: str, unit_index: int) -> AnyUnitResult | None:
        """One unit's recorded result."""
        query = sa.select(unit_results.c.result).where(
            unit_results.c.job_id == job_id, unit_results.c.unit_index == unit_index
        )
        with self.engine.connect() as connection:
            found = connection.scalar(query)
        return None if found is None else parse_result(found)

    def unit_results(self, job_id: str) -> list[AnyUnitResult]:
        query = sa.select(unit_results.c.result).where(unit_results.c.job_id == job_id)
        with self.engine.connect() as connection:
            found = connection.scalars(query.order_by(unit_results.c.unit_index)).all()
        return [parse_result(result) for result in found]

    # --- events

    def append_event(
        self, job_id: str, type: EventType, data: dict[str, Any], owner: str | None = None
    ) -> Event | None:
        with self._writing(job_id, owner) as connection:
            return self._append(connection, job_id, type, data)

    @contextmanager
    def _writing(self, job_id: str, owner: str | None) -> Iterator[sa.Connection]:
        with self.engine.begin() as connection:
            require_owner(connection, job_id, owner)
            yield connection

    def _append(
        self, connection: sa.Connection, job_id: str, type: EventType, data: dict[str, Any]
    ) -> Event | None:
        # The counter's row is locked until the commit, so ids have no gaps and no duplicates;
        # once end_event is set nothing is added, so a job ends exactly once.
        closes = type.removeprefix("job.") in TERMINAL
        count = self._count_and_close if closes else self._count
        values = {"event_job": job_id} | ({"event_type": type} if closes else {})
        row = connection.execute(count, values).first()
        if row is None:
            return None
        event = {"seq": row.num_events, "type": type, "at": row.at, "data": data}
        connection.execute(sa.insert(events), {"job_id": job_id, **event})
        if closes:
            self._ended_views.write(connection, job_id)
        if row.webhook is not None and closes:
            self._queue_delivery(connection, job_id, row.webhook, type, row.at)
        return Event(id=row.num_events, type=type, at=time_of(row.at), data=data)

    def _queue_delivery(
        self, connection: sa.Connection, job_id: str, url: str, type: EventType, at_ms: int
    ) -> None:
        found = connection.execute(job_views(self._workflows).where(jobs.c.id == job_id)).one()
        view = job_view(found)
        webhooks.queue_delivery(connection, url=url, type=type, view=view, at_ms=at_ms)

    def events_after(self, job_id: str, after: int, limit: int | None = None) -> list[Event]:
        return self._event_reads.after(job_id, after, limit)

    def notable_events(self, job_id: str, limit: int) -> tuple[list[Event], int]:
        return self._event_reads.notable(job_id, limit)

    def news(self, known: Mapping[str, int | None]) -> dict[str, tuple[int, list[Event]]]:
        return self._event_reads.news(known)

    def settle(self, job_id: str) -> None:
        """Write a job's closing event if DBOS says that it has ended and none is there.

        The event follows the state, never the other way round, so a crash between the two only
        delays it until somebody looks.
        """
        query = job_views(self._workflows).where(jobs.c.id == job_id, jobs.c.end_event.is_(None))
        ended = [s for word in TERMINAL for s in queue.dbos_statuses(word)]
        with self.engine.connect() as connection:
            row = connection.execute(query.where(self._workflows.c.status.in_(ended))).first()
        if row is None:
            return
        view = job_view(row)
        data: dict[str, Any] = {"num_units_finished": view.num_units_finished}
        if view.error is not None:
            data |= view.error.model_dump()
        types: dict[str, EventType] = {
            "succeeded": "job.succeeded",
            "failed": "job.failed",
            "cancelled": "job.cancelled",
        }
        self.append_event(job_id, types[view.status], data)

    def fill_ended_views(self, before: str | None, limit: int) -> str | None:
        """Write what `list_jobs_json` sends for ended jobs where that is missing; see `fill`."""
        return self._ended_views.fill(before, limit)

    def settle_all(self) -> None:
        """`settle` every job whose closing event is missing."""
        ended = [s for word in TERMINAL for s in queue.dbos_statuses(word)]
        query = (
            sa.select(jobs.c.id)
            .join(self._workflows, self._workflows.c.workflow_uuid == jobs.c.id)
            .where(jobs.c.end_event.is_(None), self._workflows.c.status.in_(ended))
        )
        with self.engine.connect() as connection:
            left_open = connection.scalars(query).all()
        for job_id in left_open:
            self.settle(job_id)

    # --- workers

    def list_workers(self) -> list[WorkerView]:
        query = sa.select(workers, self._now.label("now"))
        newest_first = (workers.c.last_heartbeat.desc(), workers.c.name)
        with self.engine.connect() as connection:
            rows = connection.execute(query.order_by(*newest_first)).all()
        return [
            WorkerView.model_validate(
                row.view
                | {
                    "last_heartbeat": time_of(row.last_heartbeat),
                    "alive": not row.stopped
                    and abs(row.now - row.last_heartbeat) <= self._worker_stale_ms,
                }
            )
            for row in rows
        ]

    def feed_metrics(self, registry: CollectorRegistry) -> None:
        """Have the registry tell of the whole service; what is counted is counted from now on."""
        stale_s = self._worker_stale_ms / 1000
        ServiceMetrics(registry, self.engine, self._reads, stale_s)

    def ready(self) -> Readiness:
        return look(self.engine, self._revision)


def _count_event(now: sa.ColumnElement[int]) -> tuple[Any, Any]:
    """Takes the next event id of an open job; the second one closes it, too. Made once."""
    one = (
        sa.update(jobs)
        .where(jobs.c.id == sa.bindparam("event_job"), jobs.c.end_event.is_(None))
        .values(num_events=jobs.c.num_events + 1)
    )
    count = one.returning(jobs.c.num_events, now.label("at"), jobs.c.webhook)
    event_type: sa.BindParameter[str] = sa.bindparam("event_type")
    ends = one.values(end_event=event_type, ended_at=now, **UNIT_TOTALS)
    # Not the clock again: Postgres's goes on within a statement.
    return count, ends.returning(jobs.c.num_events, jobs.c.ended_at.label("at"), jobs.c.webhook)
