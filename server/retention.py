"""Remove jobs that have ended, by rules: their rows here and in DBOS, and their logs.

Works on the database beside a running service, a few jobs to a transaction. Queued and running
jobs are never touched, nor is one whose webhook has yet to be delivered. A removal that is killed
half-way leaves no half job that anybody sees; the next removal finishes it.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from dbos import DBOSClient

from probe.errors import ConfigError
from server import queue, tables
from server.tables import job_labels, jobs, webhook_deliveries
from server.wire import TERMINAL

logger = logging.getLogger(__name__)

_BATCH = 20  # jobs to a transaction; a long one has thousands of events
_LONGEST_S = 1e12  # longer ago than any job; what is more may not fit a column
_FREE_PAGES = 2000  # of SQLite to a step: some 8 MB


@dataclass(frozen=True, slots=True)
class Rules:
    """Which ended jobs to remove: those that every given rule allows.

    Attributes:
        older_than_s: Ended at least so long ago; None: whenever.
        statuses: Of succeeded, failed, cancelled; empty: all of them.
        kinds: Of job; empty: all.
        labels: All of which a job must have.
        keep_last: The newest so many ended jobs of each name stay, whatever the rules above say.
    """

    older_than_s: float | None = None
    statuses: Sequence[str] = ()
    kinds: Sequence[str] = ()
    labels: dict[str, str] = field(default_factory=dict)
    keep_last: int = 0

    def check(self) -> None:
        """Refuse rules that say nothing, or what no job can be.

        Raises:
            ConfigError: With what to change.
        """
        wrong = sorted(set(self.statuses) - TERMINAL)
        if wrong:
            raise ConfigError(
                f"only jobs that have ended are removed: found status {', '.join(wrong)}, "
                f"choose from {', '.join(sorted(TERMINAL))}"
            )
        if self.keep_last < 0 or (self.older_than_s is not None and self.older_than_s < 0):
            raise ConfigError("an age and a number of jobs to keep cannot be negative")
        given = (self.older_than_s is not None, self.statuses, self.kinds, self.labels)
        if not any(given) and not self.keep_last:
            raise ConfigError(
                "no rule given, so every job that has ended would go: say which with --older-than, "
                "--status, --kind, --label or --keep-last"
            )


@dataclass(frozen=True, slots=True)
class Candidate:
    """A job that the rules pick."""

    id: str
    name: str
    kind: str
    status: str
    ended_at: int  # ms since the epoch


@dataclass(slots=True)
class Removed:
    """What a removal came to."""

    num_jobs: int = 0
    num_logs: int = 0


def candidates(engine: sa.Engine, rules: Rules) -> list[Candidate]:
    """The jobs that the rules pick, oldest first."""
    rules.check()
    query = sa.select(jobs.c.id, jobs.c.name, jobs.c.kind, jobs.c.end_event, jobs.c.ended_at)
    query = query.where(*_conditions(engine, rules)).order_by(jobs.c.id)
    with engine.connect() as connection:
        return [
            Candidate(job_id, name, kind, end_event.removeprefix("job."), ended_at)
            for job_id, name, kind, end_event, ended_at in connection.execute(query)
        ]


def _conditions(engine: sa.Engine, rules: Rules) -> Iterator[sa.ColumnElement[bool]]:
    yield _is_over()
    if rules.older_than_s is not None:
        age_s = min(rules.older_than_s, _LONGEST_S)
        yield tables.now_ms(engine) - jobs.c.ended_at >= int(age_s * 1000)
    if rules.statuses:
        yield jobs.c.end_event.in_([f"job.{status}" for status in rules.statuses])
    if rules.kinds:
        yield jobs.c.kind.in_(list(rules.kinds))
    for key, value in rules.labels.items():
        label = sa.exists().where(job_labels.c.job_id == jobs.c.id)
        yield label.where(job_labels.c.key == key, job_labels.c.value == value)
    if rules.keep_last:
        newest = sa.func.row_number().over(partition_by=jobs.c.name, order_by=jobs.c.id.desc())
        ranked = sa.select(jobs.c.id, newest.label("rank")).where(jobs.c.end_event.is_not(None))
        table = ranked.subquery()
        yield jobs.c.id.in_(sa.select(table.c.id).where(table.c.rank > rules.keep_last))


def _is_over() -> sa.ColumnElement[bool]:
    # end_event follows DBOS's state and stays, so that whoever has it never runs again.
    untold = sa.exists().where(
        webhook_deliveries.c.job_id == jobs.c.id, webhook_deliveries.c.next_attempt_at.is_not(None)
    )
    return sa.and_(jobs.c.end_event.is_not(None), sa.not_(untold))


def remove(
    engine: sa.Engine, client: DBOSClient, job_ids: Sequence[str], logs_dir: Path
) -> Removed:
    """Remove these jobs, their rows in DBOS, and their logs in this directory.

    Between two transactions others get as long as the last one took.
    """
    removed = Removed()
    _remove_rests(engine, client)
    for start in range(0, len(job_ids), _BATCH):
        began = time.monotonic()
        batch = job_ids[start : start + _BATCH]
        removed.num_logs += sum(_remove_log(logs_dir, job_id) for job_id in batch)
        with engine.begin() as connection:
            gone = connection.scalars(
                sa.delete(jobs).where(jobs.c.id.in_(batch), _is_over()).returning(jobs.c.id)
            ).all()
        # After ours: what a kill leaves between the two are rows that nobody asks for.
        client.delete_workflows(list(gone))
        removed.num_jobs += len(gone)
        time.sleep(time.monotonic() - began)
    logger.info("%d jobs removed", removed.num_jobs, extra={"event": "jobs.removed"})
    return removed


def _remove_rests(engine: sa.Engine, client: DBOSClient) -> None:
    """Finish what an earlier removal has begun: ended workflows of jobs that are gone."""
    workflows = queue.workflow_status_table(engine)
    ended = [word for status in TERMINAL for word in queue.dbos_statuses(status)]
    known = sa.exists().where(jobs.c.id == workflows.c.workflow_uuid)
    query = sa.select(workflows.c.workflow_uuid).where(
        workflows.c.status.in_(ended),
        workflows.c.workflow_uuid.like(r"job\_%", escape="\\"),
        sa.not_(known),
    )
    with engine.connect() as connection:
        rests = list(connection.scalars(query))
    for start in range(0, len(rests), _BATCH):
        client.delete_workflows(rests[start : start + _BATCH])


def _remove_log(logs_dir: Path, job_id: str) -> bool:
    try:
        (logs_dir / f"{job_id}.log").unlink()
    except FileNotFoundError:  # it ran on another machine, or never
        return False
    except OSError as error:
        logger.warning("the log of %s cannot be removed: %s", job_id, error.strerror)
        return False
    return True


def shrink(engine: sa.Engine, *, full: bool = False) -> int:
    """Give the space of removed rows back to the file system; bytes by which the file shrank.

    SQLite only: Postgres's own autovacuum makes the space free for other rows.

    Args:
        engine: The database.
        full: Write the whole file anew, which nobody may write to meanwhile, and needs as much
            free space again. For databases of the first release, which cannot shrink otherwise.
    """
    path = engine.url.database
    if not queue.is_sqlite(engine) or not path:
        return 0
    before = Path(path).stat().st_size
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if full:
            connection.exec_driver_sql("PRAGMA auto_vacuum=INCREMENTAL")
            connection.exec_driver_sql("VACUUM")
        else:
            _free_pages(connection)
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").all()
    return max(0, before - Path(path).stat().st_size)


def _free_pages(connection: sa.Connection) -> None:
    left: Any = connection.exec_driver_sql("PRAGMA freelist_count").scalar()
    while left:
        # One step frees one page, and Python's cursor takes a single step; a script goes on.
        driver: Any = connection.connection.dbapi_connection
        driver.executescript(f"PRAGMA incremental_vacuum({_FREE_PAGES})")
        remaining: Any = connection.exec_driver_sql("PRAGMA freelist_count").scalar()
        if remaining >= left:  # made without auto_vacuum
            return
        left = remaining
