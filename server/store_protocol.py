"""The `Store` interface: what the HTTP layer and the worker need from the database."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypedDict, Unpack

from probe.result import Plan
from probe.unit_results import AnyUnitResult
from server.wire import Event, EventType, JobView, Readiness, WorkerView


class JobFilters(TypedDict, total=False):
    """Which jobs a list holds; what is absent or None lets every job pass."""

    status: str | None
    kind: str | None
    queue: str | None
    labels: dict[str, str] | None  # all of them must match


class JobOrigin(TypedDict, total=False):
    """Where a job comes from and whom to tell of its end; what is absent is not known."""

    submitted_by: str | None  # name of the API key
    webhook: str | None  # checked already


class Store(Protocol):
    """What the HTTP layer and the worker need from the database. Thread-safe, synchronous."""

    def create_job(
        self,
        *,
        plan: Plan,
        idempotency_key: str | None,
        body_sha256: str,
        **origin: Unpack[JobOrigin],
    ) -> tuple[JobView, bool]:
        """Record a job and put it on the queue; (view, True), or (the earlier one, False).

        Raises:
            IdempotencyConflictError: the key was used with another body.
        """

    def earlier_job(self, idempotency_key: str, body_sha256: str) -> JobView | None:
        """The job this key made, if it made one; raises as `create_job` does."""

    def get_job(self, job_id: str) -> JobView | None: ...

    def get_jobs_json(self, job_ids: Sequence[str]) -> dict[str, bytes]:
        """As `get_job` for several jobs, as the JSON of their views; cheaper for ended ones."""

    def list_jobs(
        self, *, after: str | None = None, limit: int = 50, **filters: Unpack[JobFilters]
    ) -> tuple[list[JobView], bool]:
        """Newest first, and whether there are more; `after` is the id of the last one seen."""

    def list_jobs_json(
        self, *, after: str | None = None, limit: int = 50, **filters: Unpack[JobFilters]
    ) -> bytes:
        """As `list_jobs`, as the JSON of a `JobList`; cheaper for jobs that have ended."""

    def count_jobs(self) -> dict[str, int]:
        """Number of jobs in each state, zeros included."""

    def cancel_job(self, job_id: str) -> JobView | None:
        """Cancel a queued or running job; a finished one is returned unchanged."""

    def get_plan(self, job_id: str) -> Plan | None: ...

    def record_unit(self, job_id: str, result: AnyUnitResult, owner: str | None = None) -> bool:
        """Store a unit's result once, with its `unit.finished`; False when it was there already.

        Raises:
            JobTakenError: The execution with the token `owner` no longer has the job.
        """

    def unit_results(self, job_id: str) -> list[AnyUnitResult]: ...

    def append_event(
        self, job_id: str, type: EventType, data: dict[str, Any], owner: str | None = None
    ) -> Event | None:
        """Add to a job's events; None once the job's closing event stands.

        Raises:
            JobTakenError: The execution with the token `owner` no longer has the job.
        """

    def events_after(self, job_id: str, after: int, limit: int | None = None) -> list[Event]:
        """Events with an id above `after`, in order; a finished job's last one is `job.*ed`.

        At most `limit` of them, None: a thousand.
        """

    def news(self, known: Mapping[str, int | None]) -> dict[str, tuple[int, list[Event]]]:
        """By job the id of its newest event and those after the one known, for streams.

        Of a job whose last known event is None the newest alone; one that is not there is left out.
        """

    def notable_events(self, job_id: str, limit: int) -> tuple[list[Event], int]:
        """The last `limit` events that are not progress, in order; and the last id of all."""

    def list_workers(self) -> list[WorkerView]: ...

    def ready(self) -> Readiness:
        """The database's state; raises when it does not answer or its tables are not there."""
