"""Our own tables beside DBOS's, in the same database: jobs, unit results, events, workers.

DBOS's `workflow_status` is the one truth about a job's state; this module joins it in and never
keeps a second copy. Unit results are keyed (job_id, unit_index): the first one recorded stays.
SQLite (WAL) by default, Postgres by the same code.
"""

from typing import Any, Protocol

from probe.result import Plan, UnitResult
from server.wire import Event, EventType, JobView, WorkerView


class Store(Protocol):
    """What the HTTP layer and the worker need from the database. Thread-safe, synchronous."""

    def create_job(
        self, *, plan: Plan, idempotency_key: str | None, body_sha256: str
    ) -> tuple[JobView, bool]:
        """Record a job and put it on the queue; (view, True), or (the earlier one, False).

        Raises:
            IdempotencyConflictError: the key was used with another body.
        """

    def get_job(self, job_id: str) -> JobView | None: ...

    def list_jobs(
        self,
        *,
        status: str | None = None,
        kind: str | None = None,
        labels: dict[str, str] | None = None,
        after: str | None = None,
        limit: int = 50,
    ) -> tuple[list[JobView], bool]:
        """Newest first; `after` is the id of the last job of the page before."""

    def cancel_job(self, job_id: str) -> JobView | None:
        """Cancel a queued or running job; a finished one is returned unchanged."""

    def get_plan(self, job_id: str) -> Plan | None: ...

    def record_unit(self, job_id: str, result: UnitResult) -> bool:
        """Store a unit's result once; False when it was there already."""

    def unit_results(self, job_id: str) -> list[UnitResult]: ...

    def append_event(self, job_id: str, type: EventType, data: dict[str, Any]) -> Event: ...

    def events_after(self, job_id: str, after: int, limit: int = 1000) -> list[Event]: ...

    def beat(self, worker: WorkerView) -> None: ...

    def list_workers(self) -> list[WorkerView]: ...

    def ready(self) -> None:
        """Raise when the database does not answer or its tables are not there."""
