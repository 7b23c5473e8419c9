"""Jobs that dead workers have left: back to their queue they go, attempts and priority kept.

A worker is dead when its lock on this data directory can be had, when it has said that it ended,
or when its lease has run out. The first two are proof; the last is a guess about a clock, made
only by a worker that has itself been in steady touch with the database for longer than a lease
lasts. A guess that is wrong costs a unit measured twice, never a result recorded twice: every
write of a job is refused to whoever no longer has it.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from dbos import DBOS

from server import queue, tables
from server.tables import workers
from server.worker.heartbeat import longest_gap_s
from server.worker.name_lock import NameLock, lock_path, try_lock

logger = logging.getLogger(__name__)


def adopt_orphans(engine: sa.Engine, data_dir: Path, own_name: str) -> list[str]:
    """Queue the jobs again that dead workers of this data directory have left.

    A lock file is proof of the instances it names only: a worker of the same name may have been
    started since with another directory, or on another machine.

    Returns:
        Names of the workers whose jobs were queued; usually none.
    """
    workflows = queue.workflow_status_table(engine)
    query = (
        sa.select(workflows.c.executor_id, workers.c.instance)
        .distinct()
        .select_from(workflows.outerjoin(workers, workers.c.name == workflows.c.executor_id))
        .where(workflows.c.status == "PENDING", workflows.c.executor_id != own_name)
    )
    with engine.connect() as connection:
        holders = [(name, instance) for name, instance in connection.execute(query) if name]
    adopted = []
    for name, instance in holders:
        # Held meanwhile: a worker of that name that starts now waits, and finds them queued.
        with _lock_of_a_dead_worker(lock_path(data_dir, name), instance) as is_dead:
            if is_dead:
                queue_again([name], "its lock is free")
                adopted.append(name)
    return adopted


def adopt_by_lease(
    engine: sa.Engine, own_name: str, *, worker_stale_s: float, guess: bool
) -> list[str]:
    """Queue the jobs again of workers that have said they ended, wherever they were.

    Args:
        engine: The database.
        own_name: A worker never takes from itself: its own start does.
        worker_stale_s: How long a lease lasts, on the database's clock.
        guess: Also those whose lease has run out, or who have none.

    Returns:
        Names of the workers whose jobs were queued; usually none.
    """
    workflows = queue.workflow_status_table(engine)
    # A heartbeat from the future is of a clock that was set back since: as old as it is ahead.
    silent_s = sa.func.abs(tables.now_ms(engine) - workers.c.last_heartbeat) / 1000.0
    gone: sa.ColumnElement[bool] = workers.c.stopped
    if guess:
        own = workers.alias()
        # In the same breath: an outage that began a moment ago silences us as it does the others.
        heard_of_us = sa.exists().where(
            own.c.name == own_name,
            tables.now_ms(engine) - own.c.last_heartbeat < longest_gap_s(worker_stale_s) * 1000,
        )
        silent = sa.or_(workers.c.name.is_(None), silent_s > worker_stale_s)
        gone = sa.or_(gone, sa.and_(silent, heard_of_us))
    query = (
        sa.select(workflows.c.executor_id)
        .distinct()
        .select_from(workflows.outerjoin(workers, workers.c.name == workflows.c.executor_id))
        .where(workflows.c.status == "PENDING", workflows.c.executor_id != own_name, gone)
    )
    with engine.connect() as connection:
        names = [name for name in connection.scalars(query) if name]
    if names:
        queue_again(names, "it has stopped, or its lease has run out")
    return names


def queue_again(names: list[str], why: str) -> None:
    """Put the running jobs of these workers back on their queues; after DBOS's launch.

    DBOS's own `resume_workflow` would also bring back what a user has cancelled, and put it on
    another queue; this call changes only rows that are still running under these names.
    """
    DBOS._recover_pending_workflows(names)
    for name in names:
        logger.warning(
            "jobs of worker %s are queued again: %s", name, why, extra={"event": "worker.gone"}
        )


@contextmanager
def _lock_of_a_dead_worker(path: Path, instance: str | None) -> Iterator[bool]:
    if not path.exists():
        yield False
        return
    with path.open("a+") as file:
        # Without an instance it was written before there were leases: then the name has to do.
        yield try_lock(file) and (instance is None or instance in NameLock(file).ended)
