"""The databases that the store, the workers and the HTTP server are tested on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from server import queue
from server.store import SqlStore
from tests.server.postgres import Postgres, missing


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One server for the whole run; it ends with the run, however that ends."""
    what = missing()
    if what is not None:
        pytest.skip(f"a Postgres needs {what}")
    server = Postgres()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def postgres_template(postgres: Postgres) -> str:
    """A database with every table and no row, to be copied."""
    name = postgres.new_database()
    SqlStore(postgres.url(name)).close()
    return name


@pytest.fixture
def postgres_url(postgres: Postgres, postgres_template: str) -> Iterator[str]:
    """The URL of a new database that has its tables; for tests that are about Postgres."""
    name = postgres.new_database(postgres_template)
    yield postgres.url(name)
    postgres.drop_database(name)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new database, once of each kind; `-m "not postgres"` leaves one out."""
    if request.param == "postgres":
        url: str = request.getfixturevalue("postgres_url")
        return url
    return f"sqlite:///{tmp_path / 'data' / 'probe.db'}"


# For a test that is not about the database, and slow.
on_sqlite_only = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def dice_for_a_clock(engine: sa.Engine) -> sa.ColumnElement[int]:
    """A clock of the database no two readings of which are alike, also within a statement."""
    dice = "ABS(random() % 1000000000)" if queue.is_sqlite(engine) else "random() * 1e9"
    return sa.literal_column(f"CAST({dice} AS BIGINT)", sa.BigInteger)
