"""`python -m server.worker --check`: whether this worker's heartbeat is fresh, for health checks.

Reads the database and nothing else: no lease is taken, no table made, so it may run beside the
worker every few seconds.
"""

from pathlib import Path

import sqlalchemy as sa

from server import queue, tables
from server.settings import Settings
from server.tables import workers


def what_is_wrong(settings: Settings) -> str | None:
    """One sentence about the worker named in the settings; None when it is well.

    Cost: one connection and one row.
    """
    url = sa.make_url(settings.database_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        return f"there is no database {url.database}"  # asking would make one
    engine = queue.create_engine(settings.database_url)
    now = tables.now_ms(engine).label("now")
    query = sa.select(workers.c.last_heartbeat, workers.c.stopped, now)
    try:
        with engine.connect() as connection:
            row = connection.execute(query.where(workers.c.name == settings.worker_name)).first()
    except sa.exc.SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error  # without the statement
        return f"the database cannot be asked: {str(cause).strip()}"
    finally:
        engine.dispose()
    if row is None:
        return f"no worker named {settings.worker_name!r} has ever reported to this database"
    if row.stopped:
        return f"worker {settings.worker_name!r} has stopped"
    silent_s = (row.now - row.last_heartbeat) / 1000
    if silent_s > settings.worker_stale_s:
        return (
            f"worker {settings.worker_name!r} has been silent for {silent_s:.0f} s, "
            f"allowed are {settings.worker_stale_s:.0f} s"
        )
    return None
