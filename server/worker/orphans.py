"""Jobs that a dead worker of this data directory has left: back to their queue they go.

A worker holds a lock on `worker-NAME.lock` for as long as it lives, however it ends, so a lock
that can be had says that its worker is gone; no clock is asked. Workers that run elsewhere have
no lock here and are left alone.
"""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import sqlalchemy as sa
from dbos import DBOS

from server import queue

logger = logging.getLogger(__name__)


def lock_path(data_dir: Path, name: str) -> Path:
    """The file that the worker of this name locks."""
    return data_dir / f"worker-{name}.lock"


def adopt_orphans(engine: sa.Engine, data_dir: Path, own_name: str) -> list[str]:
    """Queue the unfinished jobs of dead workers again; call it after DBOS's launch.

    Returns:
        Names of the workers whose jobs were queued; usually none.
    """
    workflows = queue.workflow_status_table(engine)
    query = sa.select(workflows.c.executor_id).distinct()
    query = query.where(workflows.c.status == "PENDING", workflows.c.executor_id != own_name)
    with engine.connect() as connection:
        names = [name for name in connection.scalars(query) if name]
    adopted = []
    for name in names:
        # Held meanwhile: a worker of that name that starts now waits, and finds them queued.
        with _lock_of_a_dead_worker(lock_path(data_dir, name)) as lock:
            if lock is not None:
                DBOS._recover_pending_workflows([name])
                logger.info("jobs of worker %s, which is gone, are queued again", name)
                adopted.append(name)
    return adopted


@contextmanager
def _lock_of_a_dead_worker(path: Path) -> Iterator[IO[str] | None]:
    if not path.exists():
        yield None
        return
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
        else:
            yield lock
