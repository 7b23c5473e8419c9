"""Our own tables, in the database DBOS uses too. Times are milliseconds since the epoch.

They are made and changed by `server.migrations`; what stands here is what that comes to.
"""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from server import queue

_ADVISORY_LOCK = 0x5052_4F42  # any number, the same in every process
_LOCK_POLL_S = 0.05

metadata = sa.MetaData()

# Only for the first release, which refuses a database of a higher version than its own.
schema_version = sa.Table("schema_version", metadata, sa.Column("version", sa.Integer))

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),  # also DBOS's workflow id; sorts by age
    sa.Column("kind", sa.String(64), nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("labels", sa.JSON, nullable=False),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("spec_sha256", sa.String(64), nullable=False),
    sa.Column("plan", sa.JSON, nullable=False),
    sa.Column("num_units", sa.Integer, nullable=False),
    sa.Column("expected_forward_passes", sa.BigInteger, nullable=False),
    sa.Column("idempotency_key", sa.Text, unique=True),
    sa.Column("body_sha256", sa.String(64), nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("started_at", sa.BigInteger),
    # The last failure seen. It speaks for the job only once DBOS says that the job failed.
    sa.Column("error_code", sa.String(64)),
    sa.Column("error_message", sa.Text),
    sa.Column("error_unit_id", sa.Text),
    # Counter behind the gapless event ids, and the event that closed the log.
    sa.Column("num_events", sa.Integer, nullable=False),
    sa.Column("end_event", sa.String(32)),
    sa.Column("ended_at", sa.BigInteger),
    # Of the finished units, from the closing event on; see server.job_views.
    sa.Column("num_finished", sa.Integer),
    sa.Column("num_without_answer", sa.Integer),
    sa.Column("num_forward_passes", sa.BigInteger),
    sa.Column("queue", sa.String(16)),
    sa.Column("webhook", sa.Text),  # perhaps a secret: never sent
    sa.Column("submitted_by", sa.String(100)),  # name of the API key
    sa.Column("traceparent", sa.String(55)),  # of the request that made it: W3C trace context
    # Brought here with its results: DBOS knows nothing of it, its state is its end_event.
    sa.Column("imported_at", sa.BigInteger),
    sa.Index("jobs_kind", "kind", "id"),
    # What has yet to get its closing event is found without reading every job.
    sa.Index("jobs_open", "end_event", "id"),
    # The latest that ended in a queue tell how long a job there takes.
    sa.Index("jobs_queue", "queue", "end_event", "id"),
)

job_labels = sa.Table(
    "job_labels",
    metadata,
    sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("key", sa.String(63), primary_key=True),
    sa.Column("value", sa.String(255), nullable=False),
    sa.Index("job_labels_value", "key", "value", "job_id"),
)

# Beside `jobs`, whose rows hold whole plans; see server.ended_views.
ended_views = sa.Table(
    "ended_views",
    metadata,
    sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("body", sa.Text, nullable=False),  # JSON of a JobView
)

unit_results = sa.Table(
    "unit_results",
    metadata,
    sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("unit_index", sa.Integer, primary_key=True),
    sa.Column("has_every_answer", sa.Boolean, nullable=False),
    sa.Column("num_forward_passes", sa.BigInteger, nullable=False),
    sa.Column("recorded_at", sa.BigInteger, nullable=False),
    sa.Column("result", sa.JSON, nullable=False),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("type", sa.String(32), nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
    # The metrics read what came since they looked last, without the many rows of progress.
    sa.Index("events_at", "type", "at"),
)

workers = sa.Table(
    "workers",
    metadata,
    sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("last_heartbeat", sa.BigInteger, nullable=False),
    sa.Column("stopped", sa.Boolean, nullable=False),
    sa.Column("view", sa.JSON, nullable=False),
    sa.Column("instance", sa.String(36)),  # of the process that holds the name's lease
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),  # the part of a key that may be shown
    sa.Column("name", sa.String(100), nullable=False, unique=True),
    sa.Column("secret_sha256", sa.String(64), nullable=False),
    sa.Column("scope", sa.String(16), nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.BigInteger),
    sa.Column("revoked_at", sa.BigInteger),
    sa.Column("last_used_at", sa.BigInteger),
)

# Written in one transaction with the closing event, so that no end goes untold.
webhook_deliveries = sa.Table(
    "webhook_deliveries",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, unique=True),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("num_attempts", sa.Integer, nullable=False),
    sa.Column("next_attempt_at", sa.BigInteger),  # None: delivered, or given up
    sa.Column("delivered_at", sa.BigInteger),
    sa.Column("last_error", sa.Text),
    sa.Index("webhook_deliveries_due", "next_attempt_at"),
)


def create_tables(engine: sa.Engine) -> str:
    """Create or upgrade what is there, DBOS's tables included; the revision it comes to.

    Safe from several processes at once.

    Raises:
        StoreVersionError: A newer program has written this database.
    """
    from server import migrations  # alembic is needed for this moment only

    with _migration_lock(engine):
        if queue.is_sqlite(engine):
            _set_up_file(engine)
        queue.migrate(engine.url.render_as_string(hide_password=False))
        with engine.connect() as connection:
            if queue.is_sqlite(engine):
                # Python's driver begins no transaction for DDL: a kill half-way must undo it all.
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            migrations.upgrade(connection)
            connection.commit()
    return migrations.newest_revision()


def _set_up_file(engine: sa.Engine) -> None:
    """What SQLite keeps in the file: the journal's mode; and in a new file that it can shrink."""
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA auto_vacuum=INCREMENTAL")  # before the first write
        connection.exec_driver_sql("PRAGMA journal_mode=wal")


@contextmanager
def _migration_lock(engine: sa.Engine) -> Iterator[None]:
    if not queue.is_sqlite(engine):
        # Asked for again and again, in no transaction: DBOS creates indexes concurrently, which
        # waits for every transaction that began before, and one waiting for this lock is one.
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            while not connection.scalar(sa.select(sa.func.pg_try_advisory_lock(_ADVISORY_LOCK))):
                time.sleep(_LOCK_POLL_S)
            try:
                yield
            finally:
                connection.execute(sa.select(sa.func.pg_advisory_unlock(_ADVISORY_LOCK)))
        return
    if not engine.url.database:
        yield
        return
    with Path(f"{engine.url.database}.migrate-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def now_ms(engine: sa.Engine) -> sa.ColumnElement[int]:
    """The database's clock, so that no two machines' clocks are ever compared."""
    if queue.is_sqlite(engine):
        return sa.literal_column(
            "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)", sa.BigInteger
        )
    return sa.literal_column(
        "CAST(EXTRACT(epoch FROM clock_timestamp()) * 1000 AS BIGINT)", sa.BigInteger
    )
