"""What has happened since it was asked last, from the events table, for the metrics.

Only events that count are read: not progress. An event's time is taken before its transaction
commits, so one may become visible after later ones have been read; therefore the last half minute
is read again each time, and what was seen in it is remembered.
"""

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from server import tables
from server.tables import events, jobs

_OVERLAP_MS = 30_000  # longer than a transaction of ours waits for the disk or a lock
_ENDS = ("job.succeeded", "job.failed", "job.cancelled")
_TYPES = ("job.running", "unit.retrying", "unit.finished", *_ENDS)
_FIRST_START = 2  # id of the event after job.queued; a later start is not the first


@dataclass(frozen=True, slots=True)
class Happening:
    """One event, with what the metrics need of it."""

    type: str
    kind: str
    queue: str
    queue_wait_s: float | None = None  # of a job's first start
    code: str | None = None
    duration_s: float | None = None
    num_forward_passes: int = 0
    num_tokens: int = 0
    memory_bytes: int | None = None


class EventFollower:
    """Not thread-safe: whoever shares one holds a lock."""

    def __init__(self, engine: sa.Engine) -> None:
        """Begin now: what happened before is not told."""
        self._engine = engine
        self._query = _query()
        now = sa.select(tables.now_ms(engine).label("now"))
        with engine.connect() as connection:
            self._now = now
            self._since = int(connection.scalar(now) or 0)
        self._seen: dict[tuple[str, int], int] = {}
        self._begin = self._since

    def news(self) -> list[Happening]:
        """What has happened since the last call, each event once."""
        since = max(self._begin, self._since - _OVERLAP_MS)
        with self._engine.connect() as connection:
            now = int(connection.scalar(self._now) or 0)
            rows = connection.execute(self._query, {"since": since}).all()
        new = [row for row in rows if (row.job_id, row.seq) not in self._seen]
        self._seen |= {(row.job_id, row.seq): row.at for row in new}
        self._since = max(self._since, now)
        oldest = self._since - _OVERLAP_MS
        self._seen = {key: at for key, at in self._seen.items() if at >= oldest}
        return [_happening(row) for row in new]


def _query() -> sa.Select[Any]:
    data = events.c.data
    return (
        sa.select(
            events.c.job_id,
            events.c.seq,
            events.c.type,
            events.c.at,
            jobs.c.kind,
            jobs.c.queue,
            jobs.c.created_at,
            data["code"].as_string().label("code"),
            data["duration_s"].as_float().label("duration_s"),
            # As float: a count may be larger than Postgres' integer.
            data["num_forward_passes"].as_float().label("num_forward_passes"),
            data["num_tokens"].as_float().label("num_tokens"),
            data["memory_bytes"].as_float().label("memory_bytes"),
        )
        .join(jobs, jobs.c.id == events.c.job_id)
        # Brought here with its results, it happened elsewhere.
        .where(
            events.c.type.in_(_TYPES),
            events.c.at >= sa.bindparam("since"),
            jobs.c.imported_at.is_(None),
        )
    )


def _happening(row: Any) -> Happening:
    first_start = row.type == "job.running" and row.seq == _FIRST_START
    return Happening(
        type=row.type,
        kind=row.kind,
        queue=row.queue or "",
        queue_wait_s=max(0, row.at - row.created_at) / 1000 if first_start else None,
        code=row.code,
        duration_s=row.duration_s,
        num_forward_passes=int(row.num_forward_passes or 0),
        num_tokens=int(row.num_tokens or 0),
        memory_bytes=None if row.memory_bytes is None else int(row.memory_bytes),
    )
