"""Where a queued job stands in its queue, and about when it will start.

`starts` and `Experience` are plain arithmetic; `Forecast` reads what they need, which is the
queued and running jobs, the workers, and at most `_LEARN_FROM` finished jobs of the queue: how
many jobs have ended makes no difference. Postgres and SQLite, by the same code.
"""

import datetime as dt
import heapq
import statistics
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from server import queue, tables
from server.tables import jobs, unit_results, workers
from server.wire import JobView

_LEARN_FROM = 50  # finished jobs of one queue, the latest
_MAX_QUEUED = 5000  # jobs ahead that an estimate looks at; behind them there is none
_IN_FLIGHT = ("ENQUEUED", "PENDING")
_KEEP_S = 1.0  # estimates are computed at most once a second and queue


@dataclass(frozen=True, slots=True)
class Finished:
    """A job that has succeeded."""

    kind: str
    num_passes: int  # planned
    duration_s: float


@dataclass(frozen=True, slots=True)
class Experience:
    """What finished jobs of a queue say about how long another one takes."""

    finished: Sequence[Finished]

    def duration_s(self, kind: str, num_passes: int) -> float | None:
        """Expected duration T of a job with p planned forward passes.

        T = p * median(t_i / p_i) over the finished jobs i of its kind with p_i > 0, of duration
        t_i; median(t_i) where p or every p_i is zero. Where none of its kind has finished, over
        the jobs of all kinds. None: no job has finished.
        """
        alike = [job for job in self.finished if job.kind == kind] or list(self.finished)
        if not alike:
            return None
        rates = [job.duration_s / job.num_passes for job in alike if job.num_passes > 0]
        if num_passes > 0 and rates:
            return num_passes * statistics.median(rates)
        return statistics.median(job.duration_s for job in alike)


def remaining_s(elapsed_s: float, share_finished: float, expected_s: float) -> float:
    """Time a running job still needs.

    With share f of its units finished after e seconds, e * (1 - f) / f; before the first one,
    max(T - e, 0) with T from `Experience`.
    """
    if share_finished > 0:
        return elapsed_s * (1 - share_finished) / share_finished
    return max(expected_s - elapsed_s, 0.0)


def starts(num_slots: int, running_s: Iterable[float], queued_s: Iterable[float]) -> list[float]:
    """Seconds from now until each queued job starts, then until one behind them all would.

    List scheduling: every job, in order, goes to the slot that is free first,
    S_j = min over slots k of F_k, then F_k = S_j + T_j.

    Args:
        num_slots: Jobs that run at once, all live workers together; >= 1.
        running_s: What running jobs still need; they hold slots first.
        queued_s: Expected durations T_j of the queued ones, the next one first.
    """
    free = [0.0] * num_slots
    for needed in running_s:
        heapq.heapreplace(free, free[0] + needed)
    found = []
    for needed in queued_s:
        found.append(free[0])
        heapq.heapreplace(free, free[0] + needed)
    return [*found, free[0]]


@dataclass(frozen=True, slots=True)
class _Estimates:
    made_at: float  # monotonic
    now_ms: int
    starts_s: list[float]


class Forecast:
    """Adds position and estimated start to views of queued jobs. Thread-safe."""

    def __init__(self, engine: sa.Engine, worker_stale_s: float, *, keep_s: float = _KEEP_S):
        """Read nothing yet.

        Args:
            engine: The database.
            worker_stale_s: A worker silent for longer takes no jobs.
            keep_s: How long an estimate is good for.
        """
        self._engine = engine
        self._stale_ms = int(worker_stale_s * 1000)
        self._keep_s = keep_s
        self._workflows = queue.workflow_status_table(engine)
        self._now = tables.now_ms(engine)
        self._place, self._num_before = _place_of_one(self._workflows)
        self._lock = threading.Lock()
        self._estimates: dict[str, _Estimates] = {}

    def add_to(self, views: Sequence[JobView]) -> list[JobView]:
        """The views, those of queued jobs with `queue_position` and `estimated_start`."""
        queued = [view.id for view in views if view.status == "queued"]
        if not queued:
            return list(views)
        with self._engine.connect() as connection:
            positions = self.positions(connection, queued)
            return [
                self._with_place(connection, view, positions[view.id])
                if view.id in positions
                else view
                for view in views
            ]

    def _with_place(self, connection: sa.Connection, view: JobView, position: int) -> JobView:
        start = self._start(connection, view.queue or "gpu", position)
        return view.model_copy(update={"queue_position": position, "estimated_start": start})

    def positions(self, connection: sa.Connection, job_ids: Sequence[str]) -> dict[str, int]:
        """Place of each of these jobs in its queue, 1 for the next; jobs not waiting are left out.

        Cost: of one job a count over the part of DBOS's index ahead of it; of several one pass
        over the queued jobs.
        """
        if len(job_ids) == 1:
            return self._position(connection, job_ids[0])
        waiting = _waiting(self._workflows)
        row = self._workflows.c
        rank = sa.func.row_number().over(
            partition_by=row.queue_name,
            order_by=(row.priority, row.created_at, row.workflow_uuid),
        )
        ranked = sa.select(row.workflow_uuid.label("id"), rank.label("rank")).where(waiting)
        table = ranked.subquery()
        found = connection.execute(sa.select(table).where(table.c.id.in_(job_ids)))
        return {job_id: number for job_id, number in found}

    def _position(self, connection: sa.Connection, job_id: str) -> dict[str, int]:
        mine = connection.execute(self._place, {"id": job_id}).first()
        if mine is None:
            return {}
        number = connection.scalar(self._num_before, {"id": job_id, **mine._mapping})
        return {job_id: number or 1}

    def _start(self, connection: sa.Connection, name: str, position: int) -> dt.datetime | None:
        with self._lock:
            known = self._estimates.get(name)
            if known is None or time.monotonic() - known.made_at > self._keep_s:
                known = self._estimate(connection, name)
                self._estimates[name] = known
        # Jobs that came since then stand behind those that were looked at.
        index = min(position, len(known.starts_s)) - 1
        if index < 0 or position > _MAX_QUEUED:
            return None
        moment_ms = known.now_ms + 1000 * known.starts_s[index]
        return dt.datetime.fromtimestamp(moment_ms / 1000, dt.UTC)

    def _estimate(self, connection: sa.Connection, name: str) -> _Estimates:
        now_ms: int = connection.scalar(sa.select(self._now)) or 0
        num_slots = self._num_slots(connection, name)
        experience = Experience(self._finished(connection, name)) if num_slots else Experience([])
        found: list[float] = []
        if experience.finished:
            running = self._running_s(connection, name, experience)
            found = starts(num_slots, running, self._queued_s(connection, name, experience))
        return _Estimates(time.monotonic(), now_ms, found)

    def _num_slots(self, connection: sa.Connection, name: str) -> int:
        live = sa.select(workers.c.view).where(
            sa.not_(workers.c.stopped),
            sa.func.abs(self._now - workers.c.last_heartbeat) <= self._stale_ms,
        )
        views = [view for view in connection.scalars(live) if name in view["queues"]]
        return sum(view.get("slots", {}).get(name, 1) for view in views)

    def _finished(self, connection: sa.Connection, name: str) -> list[Finished]:
        took_ms = jobs.c.ended_at - jobs.c.started_at
        query = (
            sa.select(jobs.c.kind, jobs.c.expected_forward_passes, took_ms)
            .where(jobs.c.queue == name, jobs.c.end_event == "job.succeeded")
            .where(jobs.c.imported_at.is_(None))  # measured elsewhere, on another machine
            .order_by(jobs.c.id.desc())
            .limit(_LEARN_FROM)
        )
        rows = connection.execute(query).all()
        return [Finished(kind, passes, ms / 1000) for kind, passes, ms in rows if ms is not None]

    def _running_s(
        self, connection: sa.Connection, name: str, experience: Experience
    ) -> list[float]:
        finished = sa.select(sa.func.count()).where(unit_results.c.job_id == jobs.c.id)
        query = self._jobs_of(name, "PENDING").add_columns(
            (self._now - jobs.c.started_at).label("elapsed_ms"),
            jobs.c.num_units,
            finished.scalar_subquery().label("num_finished"),
        )
        return [
            remaining_s(
                (row.elapsed_ms or 0) / 1000,
                row.num_finished / max(row.num_units, 1),
                experience.duration_s(row.kind, row.expected_forward_passes) or 0.0,
            )
            for row in connection.execute(query)
        ]

    def _queued_s(
        self, connection: sa.Connection, name: str, experience: Experience
    ) -> list[float]:
        row = self._workflows.c
        order = (row.priority, row.created_at, row.workflow_uuid)
        query = self._jobs_of(name, "ENQUEUED").order_by(*order).limit(_MAX_QUEUED)
        return [
            experience.duration_s(kind, passes) or 0.0 for kind, passes in connection.execute(query)
        ]

    def _jobs_of(self, name: str, status: str) -> sa.Select[Any]:
        row = self._workflows.c
        return (
            sa.select(jobs.c.kind, jobs.c.expected_forward_passes)
            .join(self._workflows, row.workflow_uuid == jobs.c.id)
            .where(row.queue_name == name, row.status == status, _in_flight(self._workflows))
        )


def _place_of_one(workflows: sa.Table) -> tuple[sa.Select[Any], sa.Select[Any]]:
    """What a waiting job's place depends on; with that, how many are before it, itself included.

    Made once: every submission asks, and SQLAlchemy takes longer to make them than a database to
    answer.
    """
    own, other = workflows.c, workflows.alias("other")
    key = sa.select(own.queue_name, own.priority, own.created_at).where(
        own.workflow_uuid == sa.bindparam("id"), _waiting(workflows)
    )
    mine: dict[str, sa.BindParameter[Any]] = {
        name: sa.bindparam(name) for name in ("queue_name", "priority", "created_at", "id")
    }
    as_urgent = other.c.priority == mine["priority"]
    before = other.c.created_at < mine["created_at"]
    same_age = sa.and_(
        other.c.created_at == mine["created_at"], other.c.workflow_uuid <= mine["id"]
    )
    number = (
        sa.select(sa.func.count())
        .where(other.c.queue_name == mine["queue_name"], _waiting(other))
        .where(
            sa.or_(
                other.c.priority < mine["priority"],
                sa.and_(as_urgent, sa.or_(before, same_age)),
            )
        )
    )
    return key, number


def _waiting(workflows: sa.FromClause) -> sa.ColumnElement[bool]:
    return sa.and_(workflows.c.status == "ENQUEUED", _in_flight(workflows))


def _in_flight(workflows: sa.FromClause) -> sa.ColumnElement[bool]:
    # Spelled out and not bound: DBOS's index of jobs under way has this condition, and a planner
    # uses it only for a query that can be seen to ask for no other rows.
    enqueued, pending = (sa.literal_column(f"'{word}'", sa.Text) for word in _IN_FLIGHT)
    return workflows.c.status.in_([enqueued, pending])
