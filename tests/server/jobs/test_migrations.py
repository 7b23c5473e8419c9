"""Every database comes to the same schema: a new one, and one the first release wrote."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command, op
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from server import migrations, queue, tables
from server.errors import StoreVersionError
from server.store import SqlStore
from tests.server.jobs.conftest import Lab

# Three units done; the second one fatal; killed in the second unit; waiting; cancelled.
FIRST_RELEASE = Path(__file__).parents[1] / "databases" / "first-release-sqlite.sql"
DONE, FAILED, RUNNING, QUEUED, CANCELLED = (
    "job_01m81as4n3erpenhme8j9539ex",
    "job_01m81as4nddfbe3jag1rsd986s",
    "job_01m81as7nnq941s9x0v58v2q4v",
    "job_01m81as7sfeear0mw9te7cjbn7",
    "job_01m81as7stcgwnpxcr2szrpbv0",
)


def load_first_release(database: Path, directory: Path) -> None:
    """What the first release left, with its files in `directory`."""
    database.parent.mkdir(parents=True, exist_ok=True)
    text = FIRST_RELEASE.read_text().replace("@DIRECTORY@", str(directory))
    with sqlite3.connect(database) as connection:
        connection.executescript(text)
    connection.close()


@pytest.fixture
def first_release(tmp_path: Path) -> str:
    load_first_release(tmp_path / "probe.db", tmp_path)
    return f"sqlite:///{tmp_path / 'probe.db'}"


def differences(engine: sa.Engine) -> list:
    """What alembic would still change; DBOS's own tables are not its business."""
    ours = set(tables.metadata.tables)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={"include_object": lambda o, name, kind, *_: kind != "table" or name in ours},
        )
        return compare_metadata(context, tables.metadata)


def revision(engine: sa.Engine) -> str | None:
    with engine.connect() as connection:
        return migrations.current_revision(connection)


def test_a_new_database_has_the_tables_the_queries_are_written_for(database_url):
    store = SqlStore(database_url)
    assert differences(store.engine) == []
    assert revision(store.engine) == migrations.newest_revision() == "0002"
    store.close()


def test_a_database_of_the_first_release_loses_nothing(first_release):
    store = SqlStore(first_release)
    assert differences(store.engine) == []
    assert revision(store.engine) == migrations.newest_revision()
    found = {job.id: (job.status, job.num_units_finished) for job in store.list_jobs()[0]}
    assert found == {
        DONE: ("succeeded", 3),
        FAILED: ("failed", 1),
        RUNNING: ("running", 1),
        QUEUED: ("queued", 0),
        CANCELLED: ("cancelled", 0),
    }
    results = store.unit_results(DONE)
    assert [r.measurements[0].eta_c for r in results] == [2.0, 4.0, 8.0]
    events = store.events_after(DONE, 0)
    assert [event.id for event in events] == list(range(1, len(events) + 1))
    assert events[-1].type == "job.succeeded"
    with store.engine.connect() as connection:
        queues = dict(connection.execute(sa.select(tables.jobs.c.id, tables.jobs.c.queue)).all())
    assert set(queues.values()) == {"gpu"}  # none of them asked for a device
    store.close()


def test_the_queue_of_an_old_job_follows_its_device(first_release):
    engine = queue.create_engine(first_release)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE jobs SET spec = json_set(spec, '$.model.device', 'cpu') WHERE id = ?", (QUEUED,)
        )
        connection.exec_driver_sql(
            "UPDATE jobs SET spec = json_remove(spec, '$.model') WHERE id = ?", (DONE,)
        )
    engine.dispose()
    store = SqlStore(first_release)
    with store.engine.connect() as connection:
        queues = dict(connection.execute(sa.select(tables.jobs.c.id, tables.jobs.c.queue)).all())
    assert (queues[QUEUED], queues[DONE], queues[RUNNING]) == ("cpu", "gpu", "gpu")
    store.close()


def test_the_first_release_refuses_an_upgraded_database(first_release):
    # It reads this number, compares it with its own 1, and ends.
    store = SqlStore(first_release)
    with store.engine.connect() as connection:
        assert connection.scalars(sa.select(tables.schema_version.c.version)).all() == [2]
    store.close()


def test_a_database_of_a_newer_release_is_refused(database_url):
    store = SqlStore(database_url)
    with store.engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    store.close()
    with pytest.raises(StoreVersionError, match="revision 9999, this program knows up to 0002"):
        SqlStore(database_url)


def test_an_upgrade_that_fails_half_way_changes_nothing(first_release, monkeypatch):
    create_index = op.create_index

    def fail_late(name, *rest):
        if name == "webhook_deliveries_due":
            raise OSError("disk full")
        create_index(name, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(op, "create_index", fail_late)
        with pytest.raises(OSError, match="disk full"):
            SqlStore(first_release)
    engine = queue.create_engine(first_release)
    inspector = sa.inspect(engine)
    assert not inspector.has_table("alembic_version")  # the first thing made
    assert not inspector.has_table("api_keys")
    assert "queue" not in {column["name"] for column in inspector.get_columns("jobs")}
    engine.dispose()
    store = SqlStore(first_release)
    assert differences(store.engine) == []
    store.close()


def test_several_processes_upgrade_one_database_at_once(first_release):
    program = "import sys; from server.store import SqlStore; SqlStore(sys.argv[1]).close()"
    started = [
        subprocess.Popen([sys.executable, "-c", program, first_release], stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    ended = [process.communicate(timeout=120)[1].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], ended


def test_a_step_back_is_not_offered(first_release):
    store = SqlStore(first_release)
    with store.engine.connect() as connection, pytest.raises(NotImplementedError, match="backup"):
        command.downgrade(migrations._config(connection), "0001")
    store.close()


def test_a_worker_goes_on_with_the_first_release_s_jobs(first_release, tmp_path):
    lab = Lab(tmp_path, first_release)
    try:
        lab.release(RUNNING)
        lab.start_worker()  # of the name of the one that was killed
        for job_id in (RUNNING, QUEUED):
            lab.until_status(job_id, "succeeded")
            results = lab.store.unit_results(job_id)
            assert [r.measurements[0].eta_c for r in results] == [2.0, 4.0, 8.0]
        assert lab.job(CANCELLED).status == "cancelled"
    finally:
        lab.close()
