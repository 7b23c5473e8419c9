"""Reading events: of one job, and what is new of many."""

from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa

from server import queue
from server.job_views import time_of
from server.queue import again_if_lost
from server.tables import events, jobs
from server.wire import TERMINAL, Event

_MAX_SEQ = 2**31 - 1  # what the column holds; Postgres takes no larger number to compare with
_LIMIT = 1000
_IDS = "ids"
_ENDED = [status for word in TERMINAL for status in queue.dbos_statuses(word)]


class EventReads:
    """Thread-safe. Statements are made once: that takes longer than most reads."""

    def __init__(self, engine: sa.Engine, settle: Callable[[str], None]) -> None:
        """Read through `engine`; `settle` writes the closing event of a job that needs one."""
        self._engine = engine
        self._settle = settle
        self._after = (
            sa.select(events)
            .where(events.c.job_id == sa.bindparam("job_id"), events.c.seq > sa.bindparam("seq"))
            .order_by(events.c.seq)
            .limit(sa.bindparam("limit"))
        )
        workflows = queue.workflow_status_table(engine)
        is_asked = jobs.c.id.in_(sa.bindparam(_IDS, expanding=True))
        self._newest = sa.select(jobs.c.id, jobs.c.num_events).where(is_asked)
        self._unsettled = (
            sa.select(jobs.c.id)
            .join(workflows, workflows.c.workflow_uuid == jobs.c.id)
            .where(is_asked, jobs.c.end_event.is_(None), workflows.c.status.in_(_ENDED))
        )

    @again_if_lost
    def after(self, job_id: str, after: int, limit: int | None = None) -> list[Event]:
        """Events of a job with an id above `after`, in order."""
        self._settle_some([job_id])
        with self._engine.connect() as connection:
            return self._read(connection, job_id, after, limit or _LIMIT)

    @again_if_lost
    def notable(self, job_id: str, limit: int) -> tuple[list[Event], int]:
        """The last events of a job that are not progress, in order; and the last id of all."""
        self._settle_some([job_id])
        query = (
            sa.select(events)
            .where(events.c.job_id == job_id, events.c.type != "unit.progress")
            .order_by(events.c.seq.desc())
            .limit(limit)
        )
        with self._engine.connect() as connection:
            last = connection.scalar(sa.select(jobs.c.num_events).where(jobs.c.id == job_id))
            found = [_event(row) for row in connection.execute(query)]
        return found[::-1], last or 0

    @again_if_lost
    def news(self, known: Mapping[str, int | None]) -> dict[str, tuple[int, list[Event]]]:
        """By job: the id of its newest event, and the events after the one known.

        Args:
            known: By job the id of the last event known; None: read the newest alone.

        Returns:
            Without the jobs that are not there. At most a thousand events of each.

        Cost: two queries, and one for each job with news.
        """
        ids = list(known)
        self._settle_some(ids)
        found = {}
        with self._engine.connect() as connection:
            for job_id, newest in connection.execute(self._newest, {_IDS: ids}).all():
                last = known[job_id]
                last = newest - 1 if last is None else last
                new = self._read(connection, job_id, last, _LIMIT) if newest > last else []
                found[job_id] = (newest, new)
        return found

    def _settle_some(self, ids: list[str]) -> None:
        with self._engine.connect() as connection:
            ended = connection.scalars(self._unsettled, {_IDS: ids}).all()
        for job_id in ended:
            self._settle(job_id)

    def _read(
        self, connection: sa.Connection, job_id: str, after: int | None, limit: int
    ) -> list[Event]:
        values = {"job_id": job_id, "seq": min(after or 0, _MAX_SEQ), "limit": limit}
        return [_event(row) for row in connection.execute(self._after, values)]


def _event(row: Any) -> Event:
    return Event(id=row.seq, type=row.type, at=time_of(row.at), data=row.data)
