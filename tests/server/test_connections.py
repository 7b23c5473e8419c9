"""Connections to Postgres: what is read through one that was lost is read again."""

import pytest
import sqlalchemy as sa

from server import queue, tables
from server.store import SqlStore
from tests.server.jobs.conftest import _plan as make_plan


def end_all(postgres, url):
    assert postgres.terminate_connections(sa.make_url(url).database) > 0


@pytest.mark.postgres
def test_a_read_that_loses_its_connection_is_made_again(postgres, postgres_url):
    store = SqlStore(postgres_url)
    plan = make_plan()
    job = store.create_job(plan=plan, idempotency_key=None, body_sha256="0")[0]
    reads = {
        "get": lambda: store.get_job(job.id),
        "get_json": lambda: store.get_jobs_json([job.id]),
        "page": store.list_jobs,
        "page_json": store.list_jobs_json,
        "count": store.count_jobs,
        "after": lambda: store.events_after(job.id, 0),
        "notable": lambda: store.notable_events(job.id, 5),
        "news": lambda: store.news({job.id: 0}),
    }
    for name, read in reads.items():
        before = read()
        end_all(postgres, postgres_url)
        assert read() == before, name
    store.close()


def test_a_read_is_made_again_once_and_only_for_a_lost_connection():
    made = []

    def fails(error):
        made.append(error)
        raise error

    lost = sa.exc.OperationalError("SELECT 1", {}, Exception(), connection_invalidated=True)
    away = sa.exc.OperationalError(None, {}, Exception(), connection_invalidated=True)
    wrong = sa.exc.OperationalError("SELECT 1", {}, Exception())
    for error, times in ((lost, 2), (away, 1), (wrong, 1), (KeyError(), 1)):
        made.clear()
        with pytest.raises(type(error)):
            queue.again_if_lost(fails)(error)
        assert len(made) == times


@pytest.mark.postgres
def test_a_database_that_is_away_is_not_asked_twice(monkeypatch):
    """A connect that fails counts as a disconnect, for DBOS's sake; it takes seconds each time."""
    engine = queue.reading_engine(queue.create_engine("postgresql+psycopg:///x?host=/nowhere"))
    tried = []
    sa.event.listen(engine, "do_connect", lambda *_: tried.append(1))

    @queue.again_if_lost
    def read():
        with engine.connect() as connection:
            connection.execute(sa.text("SELECT 1"))

    with pytest.raises(sa.exc.OperationalError) as caught:
        read()
    assert caught.value.connection_invalidated
    assert tried == [1]


@pytest.mark.postgres
def test_reads_are_in_no_transaction(postgres_url):
    first = queue.create_engine(postgres_url)
    reading = queue.reading_engine(first)
    with reading.connect() as connection:
        assert connection.connection.dbapi_connection.autocommit
        connection.execute(sa.text("SELECT 1"))
        status = connection.connection.dbapi_connection.info.transaction_status
        assert status.name == "IDLE"
    reading.dispose()
    first.dispose()


def test_sqlite_reads_through_the_same_engine(tmp_path):
    engine = queue.create_engine(f"sqlite:///{tmp_path / 'probe.db'}")
    assert queue.reading_engine(engine) is engine


@pytest.mark.postgres
def test_locks_of_a_process_that_stopped_in_a_transaction_are_let_go(postgres_url, monkeypatch):
    """Of a machine that went to sleep, or whose cable was pulled: Postgres would wait for ever."""
    monkeypatch.setitem(queue._POSTGRES_LIMITS, "idle_in_transaction_session_timeout", "1s")
    store = SqlStore(postgres_url)
    job = store.create_job(plan=make_plan(), idempotency_key=None, body_sha256="0")[0]
    rename = sa.update(tables.jobs).values(name="of the other")
    asleep, awake = queue.create_engine(postgres_url), queue.create_engine(postgres_url)
    with asleep.connect() as stopped:
        stopped.execute(sa.update(tables.jobs).values(name="of the stopped one"))
        with awake.begin() as connection:
            connection.execute(sa.text("SET LOCAL lock_timeout = '60s'"))
            connection.execute(rename)
        with pytest.raises(sa.exc.DBAPIError) as caught:
            stopped.execute(rename)
        assert caught.value.connection_invalidated  # so that who wakes up tries again
    assert store.get_job(job.id).name == "of the other"
    for engine in (asleep, awake):
        engine.dispose()
    store.close()


@pytest.mark.postgres
def test_the_operator_s_own_limit_is_kept(postgres_url):
    option = "-c idle_in_transaction_session_timeout=90s -c statement_timeout=80s"
    url = sa.make_url(postgres_url).update_query_dict({"options": option})
    engine = queue.create_engine(url.render_as_string(hide_password=False))
    with engine.connect() as connection:
        for name, value in (("idle_in_transaction_session", "90s"), ("statement", "80s")):
            assert connection.scalar(sa.text(f"SHOW {name}_timeout")) == value
    engine.dispose()


@pytest.mark.postgres
def test_settling_many_jobs_keeps_no_transaction_open_meanwhile(postgres_url, monkeypatch):
    """With one open all the while, the limit ended it where that took long."""
    store = SqlStore(postgres_url)
    job = store.create_job(plan=make_plan(), idempotency_key=None, body_sha256="0")[0]
    workflows = queue.workflow_status_table(store.engine)
    with store.engine.begin() as connection:
        connection.execute(sa.update(workflows).values(status="SUCCESS"))
    in_use = []
    monkeypatch.setattr(store, "settle", lambda _: in_use.append(store.engine.pool.checkedout()))
    store.settle_all()
    assert in_use == [0]
    assert job.status == "queued"
    store.close()


@pytest.mark.postgres
def test_every_connection_asks_the_server_for_limits(postgres_url):
    engine = queue.create_engine(postgres_url)
    reading = queue.reading_engine(engine)
    for each in (engine, reading):
        with each.connect() as connection:
            connection.rollback()
            shown = connection.scalar(sa.text("SHOW idle_in_transaction_session_timeout"))
            assert shown == "30s"
        each.dispose()
