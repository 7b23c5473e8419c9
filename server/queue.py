"""Everything that is particular to DBOS: engine, client, worker configuration, states.

DBOS keeps a job as one row of `workflow_status`; that row is the only truth about the job's
state. The columns named in `workflow_status_table` are the whole of what this project reads
from DBOS's schema, and a contract test holds them.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import sqlalchemy as sa
from dbos import (
    DBOS,
    DBOSClient,
    DBOSConfig,
    DBOSPortableJSONSerializer,
    _dbos,  # for active_ids alone; a contract test holds it
)

from probe.spec_base import DEFAULT_PRIORITY
from server.settings import Queue
from server.wire import JobStatus

P = ParamSpec("P")
R = TypeVar("R")

APP_NAME = "sharpness-probe"
# DBOS recovers a workflow only under the version it was queued with. Raise it when a job queued
# by an older release can no longer be resumed by this one.
APP_VERSION = "1"
WORKFLOW_NAME = "probe"
DBOS_SCHEMA = "dbos"  # Postgres only; SQLite has no schemas
BUSY_TIMEOUT_MS = 30_000
# A database machine that vanishes says nothing: without these a call may wait for hours.
_POSTGRES_PATIENCE = {
    "connect_timeout": 10,  # s
    "keepalives_idle": 15,  # s
    "keepalives_interval": 5,  # s
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # ms
}
# A machine of ours that stops or vanishes in a transaction says nothing either, and its locks would
# hold up everybody else: for ever, or for hours. Ours are short, so the server ends such a session.
_POSTGRES_LIMITS = {
    "idle_in_transaction_session_timeout": "30s",
    "tcp_keepalives_idle": "15s",
    "tcp_keepalives_interval": "5s",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "30s",
}
_STATUS: dict[str, JobStatus] = {
    "ENQUEUED": "queued",
    "DELAYED": "queued",
    "PENDING": "running",
    "SUCCESS": "succeeded",
    "ERROR": "failed",
    "MAX_RECOVERY_ATTEMPTS_EXCEEDED": "failed",
    "CANCELLED": "cancelled",
}
CRASH_LOOP = "MAX_RECOVERY_ATTEMPTS_EXCEEDED"


def job_status(dbos_status: str) -> JobStatus:
    """Our word for DBOS's."""
    return _STATUS[dbos_status]


def dbos_statuses(status: str) -> list[str]:
    """DBOS's words for ours; empty for a word that is none of ours."""
    return [theirs for theirs, ours in _STATUS.items() if ours == status]


def queue_for(spec: dict[str, Any]) -> Queue:
    """The queue of a job: `cpu` where the spec says so; `auto` and `cuda` share the GPU's."""
    device = spec.get("model", {}).get("device", "auto")
    return "cpu" if device == "cpu" else "gpu"


def is_sqlite(engine: sa.Engine) -> bool:
    """Whether the engine talks to the embedded database."""
    return engine.dialect.name == "sqlite"


def insert(engine: sa.Engine, table: sa.Table) -> Any:
    """An insert that knows `on_conflict`, which only the dialects' own do."""
    if is_sqlite(engine):
        return sa.dialects.sqlite.insert(table)
    return sa.dialects.postgresql.insert(table)


def create_engine(database_url: str) -> sa.Engine:
    """One engine per process, shared by our tables and by DBOS.

    SQLite: WAL, foreign keys, writers wait for each other; the file's directory is made.
    Postgres: a lost connection always counts as a disconnect, because DBOS retries only those
    and its own list of messages misses a vanished unix socket.
    """
    url = sa.make_url(database_url)
    if url.get_backend_name() != "sqlite":
        return _postgres_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=5)
    if url.database:
        Path(url.database).absolute().parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(url)
    sa.event.listen(engine, "connect", _set_up_sqlite)
    return engine


def reading_engine(engine: sa.Engine) -> sa.Engine:
    """For single reads of the same database, without a transaction around each.

    On Postgres its begin and end are two more trips, and asking first whether the connection is
    still there is another: reads are `again_if_lost` instead. SQLite's driver begins none for
    reads, and gets the same engine back. Who disposes of one has to dispose of the other.
    """
    if is_sqlite(engine):
        return engine
    # Connections of its own: switching one over and back costs as much as it spares.
    return _postgres_engine(
        engine.url, max_overflow=5, isolation_level="AUTOCOMMIT", pool_reset_on_return=None
    )


def again_if_lost(read: Callable[P, R]) -> Callable[P, R]:
    """Call once more what only reads and lost its connection: the pool has let go of all others."""

    @functools.wraps(read)
    def reads(*args: P.args, **kw: P.kwargs) -> R:
        try:
            return read(*args, **kw)
        except sa.exc.DBAPIError as error:
            if not error.connection_invalidated or error.statement is None:
                raise  # or there was none to lose: the database is away
        return read(*args, **kw)

    return reads


def _postgres_engine(url: sa.URL, **options: Any) -> sa.Engine:
    engine = sa.create_engine(url, connect_args=_POSTGRES_PATIENCE, **options)
    own = str(url.query.get("options", ""))  # of the operator, which win
    limits = {name: value for name, value in _POSTGRES_LIMITS.items() if name not in own}
    sa.event.listen(engine, "connect", functools.partial(_set_up_postgres, limits))
    sa.event.listen(engine, "handle_error", _count_as_disconnect)
    return engine


def _set_up_postgres(limits: dict[str, str], connection: Any, _record: Any) -> None:
    if not limits:
        return
    # Set here, not as startup options, which a pooler in between may refuse.
    asked = ", ".join("set_config(%s, %s, false)" for _ in limits)
    values = [word for limit in limits.items() for word in limit]
    before, connection.autocommit = connection.autocommit, True
    connection.execute(f"SELECT {asked}", values)
    connection.autocommit = before


def _count_as_disconnect(context: sa.ExceptionContext) -> None:
    if context.connection is None:
        context.is_disconnect = True


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    # IMMEDIATE takes the write lock at a transaction's first statement, so that two writers
    # queue up instead of failing half-way; DBOS sets its own connections up the same way.
    connection.isolation_level = "IMMEDIATE"
    connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    connection.execute("PRAGMA foreign_keys=ON")


def migrate(database_url: str) -> None:
    """Create or update DBOS's own tables. Safe to run again and from several processes."""
    quiet_logging()
    DBOS.migrate(database_url, schema=DBOS_SCHEMA)


def make_client(engine: sa.Engine) -> DBOSClient:
    """A client that shares `engine`; it never migrates."""
    quiet_logging()
    return DBOSClient(
        system_database_engine=engine,
        dbos_system_schema=DBOS_SCHEMA,
        serializer=DBOSPortableJSONSerializer(),
        application_name=APP_NAME,
    )


def enqueue(
    client: DBOSClient,
    connection: sa.Connection,
    *,
    job_id: str,
    queue: Queue,
    unit_ids: Sequence[str],
    priority: int = DEFAULT_PRIORITY,
) -> None:
    """Put a job on its queue inside the caller's transaction: both rows or none.

    The lowest priority number goes first, equal ones in the order they were put there.
    """
    client.enqueue_in_transaction(
        connection,
        {
            "workflow_name": WORKFLOW_NAME,
            "queue_name": queue,
            "workflow_id": job_id,
            "app_version": APP_VERSION,
            "priority": priority,  # unset would count as 0, before every explicit priority
        },
        job_id,
        list(unit_ids),
    )


def worker_config(engine: sa.Engine, database_url: str, executor_id: str) -> DBOSConfig:
    """DBOS's configuration of a worker; jobs left by the same `executor_id` are picked up."""
    return {
        "name": APP_NAME,
        "system_database_url": database_url,
        "system_database_engine": engine,
        "dbos_system_schema": DBOS_SCHEMA,
        "executor_id": executor_id,
        "application_version": APP_VERSION,
        "serializer": DBOSPortableJSONSerializer(),
        "log_level": "WARNING",
    }


def active_ids() -> set[str]:
    """Jobs whose workflow DBOS is running in this process; empty before its launch."""
    dbos = _dbos._dbos_global_instance
    return set() if dbos is None else set(dbos._active_workflows_set.activeList())


def workflow_status_table(engine: sa.Engine) -> sa.Table:
    """The columns of DBOS's `workflow_status` that we read."""
    return sa.Table(
        "workflow_status",
        sa.MetaData(schema=None if is_sqlite(engine) else DBOS_SCHEMA),
        sa.Column("workflow_uuid", sa.Text, primary_key=True),
        sa.Column("status", sa.Text),
        sa.Column("recovery_attempts", sa.BigInteger),
        sa.Column("completed_at", sa.BigInteger),  # ms since the epoch; None until it ended
        sa.Column("queue_name", sa.Text),
        sa.Column("priority", sa.Integer),
        sa.Column("created_at", sa.BigInteger),
        sa.Column("executor_id", sa.Text),
        sa.Column("owner_xid", sa.Text),  # the token of the execution that has the job
    )


def quiet_logging() -> None:
    """Send DBOS's records through the root logger, from WARNING up, not to a console of its own."""
    logger = logging.getLogger("dbos")
    for handler in list(logger.handlers):
        if handler.name == "__dbos_console_log_handler__":
            logger.removeHandler(handler)
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    if not logger.handlers:
        # DBOS adds its console only to a logger without handlers.
        logger.addHandler(logging.NullHandler())
