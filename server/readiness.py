"""Whether the database answers and has the tables this program needs."""

import time

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from server import queue
from server.errors import StoreNotReadyError
from server.tables import jobs
from server.wire import DatabaseState, MigrationState, Readiness


def look(engine: sa.Engine, needed: str) -> Readiness:
    """The state of the database, all of it well.

    Args:
        engine: Of the database.
        needed: The schema revision of this program.

    Raises:
        StoreNotReadyError: Something is not; its `state` tells what.
    """
    workflows = queue.workflow_status_table(engine)
    begin = time.perf_counter()
    try:
        with engine.connect() as connection:
            connection.execute(sa.select(jobs.c.id).limit(1)).first()
            connection.execute(sa.select(workflows.c.status).limit(1)).first()
            found = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    except SQLAlchemyError as error:
        raise StoreNotReadyError(
            f"the database does not answer: {error}", _state(engine, needed, None, None)
        ) from error
    state = _state(engine, needed, found, 1000 * (time.perf_counter() - begin))
    if not state.migrations.ok:
        raise StoreNotReadyError(
            f"the database has schema revision {found}, this program needs {needed}: "
            "restart it, or install the release that changed the database",
            state,
        )
    return state


def not_reached(error: OperationalError) -> StoreNotReadyError:
    """The error of a program that cannot start for want of its database, in one sentence."""
    return StoreNotReadyError(
        f"the database does not answer: {str(error.orig).strip()}. Start it, or correct "
        "PROBE_DATABASE_URL, then start this again"
    )


def _state(
    engine: sa.Engine, needed: str, found: str | None, latency_ms: float | None
) -> Readiness:
    answers, fits = latency_ms is not None, found == needed
    return Readiness(
        status="ok" if answers and fits else "not_ready",
        database=DatabaseState(
            ok=answers,
            dialect=engine.dialect.name,
            latency_ms=None if latency_ms is None else round(latency_ms, 3),
        ),
        migrations=MigrationState(ok=fits, found=found, needed=needed),
    )
