"""A job's time limit: counted from its first start, on the database's clock.

The clock that counts is the one that wrote `started_at`, so the limit holds over restarts and
changes of the worker; within one unit this process's own timer goes on from there.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import sqlalchemy as sa

from probe.result import Plan
from server import tables
from server.tables import jobs
from server.worker.gang import UnitFailedError

TIME_LIMIT_EXCEEDED = "time_limit_exceeded"


def limit_of(plan: Plan) -> float | None:
    """Seconds a job may take from its first start; None: as many as it needs."""
    limit_s: float | None = plan.spec.get("time_limit_s")
    return limit_s


def seconds_since_start(engine: sa.Engine, job_id: str) -> float:
    """How long ago the job was first begun; interruptions count."""
    query = sa.select(tables.now_ms(engine) - jobs.c.started_at).where(jobs.c.id == job_id)
    with engine.connect() as connection:
        return float(connection.scalar(query) or 0) / 1000


@asynccontextmanager
async def within(limit_s: float | None, passed_s: float) -> AsyncIterator[None]:
    """Cut the block off once the job's limit has passed; do not enter it when it has.

    Raises:
        UnitFailedError: `time_limit_exceeded`; no other try can help.
    """
    if limit_s is None:
        yield
        return
    if passed_s >= limit_s:
        raise _exceeded(limit_s)
    try:
        async with asyncio.timeout(limit_s - passed_s) as timer:
            yield
    except TimeoutError as error:
        if not timer.expired():  # somebody else's, from within
            raise
        raise _exceeded(limit_s) from error


def _exceeded(limit_s: float) -> UnitFailedError:
    return UnitFailedError(
        TIME_LIMIT_EXCEEDED,
        f"{limit_s:g} s have passed since the job's first start, which is its time_limit_s; units "
        "finished until then are kept. Submit it again with a higher limit, or fewer units",
        retryable=False,
    )
