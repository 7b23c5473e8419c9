"""Whether somebody holds what others wait for in a database: a stopped process never lets go."""

import sqlite3
import time
from contextlib import closing

import sqlalchemy as sa

from server import queue

_LONGEST_S = 2.0  # of a transaction of a process that runs
_BEGUN = sa.text(
    "SELECT pid, backend_xid::text AS xid FROM pg_stat_activity "
    "WHERE datname = current_database() AND backend_type = 'client backend' "
    "AND backend_xid IS NOT NULL"
)


def is_held(engine: sa.Engine) -> bool:
    """Whether a transaction that has written, or locked a row, stays open."""
    return _sqlite_is_held(engine) if queue.is_sqlite(engine) else _postgres_is_held(engine)


def _sqlite_is_held(engine: sa.Engine) -> bool:
    path = engine.url.database
    assert path is not None
    with closing(sqlite3.connect(path, timeout=_LONGEST_S, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
        connection.execute("ROLLBACK")
    return False


def _postgres_is_held(engine: sa.Engine) -> bool:
    deadline = time.monotonic() + _LONGEST_S
    begun = _begun(engine)
    while begun := begun & _begun(engine):
        if time.monotonic() > deadline:
            return True
        time.sleep(0.02)
    return False


def _begun(engine: sa.Engine) -> set[tuple[int, str]]:
    with engine.connect() as connection:
        return {(row.pid, row.xid) for row in connection.execute(_BEGUN)}
