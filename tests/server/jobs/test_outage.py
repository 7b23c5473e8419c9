"""The database goes away while jobs run: they wait for it, and no worker takes a living one's."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from dbos._utils import retriable_postgres_exception

from server import queue
from server.tables import workers
from tests.server.jobs.conftest import DEADLINE_S, Lab
from tests.server.jobs.test_takeover import SHORT, running_in, silent_s, wait_for_worker

STOPS_IN_A_TRANSACTION = """
import os, signal, sys, time
if "server.worker" in sys.orig_argv:
    from server import queue
    from server.store import SqlStore
    def _append(self, connection, job_id, type, data):
        event = original(self, connection, job_id, type, data)
        if type == "unit.started" and data["index"] == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.5)  # a stop needs a moment to reach every thread
        return event
    original, SqlStore._append = SqlStore._append, _append
    queue._POSTGRES_LIMITS["idle_in_transaction_session_timeout"] = "3s"
"""


@pytest.fixture
def postgres_lab(tmp_path, postgres_url):
    lab = Lab(tmp_path, postgres_url)
    yield lab
    lab.close()


@pytest.mark.postgres
def test_pitfall_1_jobs_outlive_a_crash_of_postgres(postgres_lab, postgres):
    lab = postgres_lab
    jobs = [lab.submit({1: ["hold"]}, device="cpu"), lab.submit({0: ["hold"]})]
    releases = [Path(lab.job(job).spec["release"]) for job in jobs]
    worker = lab.start_worker()
    lab.until_started(jobs[0], 1)
    lab.until_started(jobs[1], 0)
    postgres.crash()
    try:
        lab.until(lambda: "no heartbeat written" in lab.output(), "the loss to be seen")
        for release in releases:
            release.touch()
        # The units are measured, and cannot be recorded.
        lab.until(lambda: "the database does not answer" in lab.output(), "the jobs to wait")
    finally:
        postgres.start()
    for job in jobs:
        lab.assert_whole(job, starts=[0, 1, 2])
    lab.assert_whole(lab.submit(), starts=[0, 1, 2])
    assert worker.poll() is None
    assert "starting again" not in lab.output()


@pytest.mark.postgres
def test_pitfall_1_a_vanished_unix_socket_is_what_dbos_waits_out(postgres, postgres_url):
    """By its message DBOS would not know it; the bare engine shows that it still does not."""
    engines = {True: queue.create_engine(postgres_url), False: sa.create_engine(postgres_url)}
    postgres.crash()
    try:
        for is_ours, engine in engines.items():
            with pytest.raises(sa.exc.OperationalError) as caught:
                engine.connect()
            assert retriable_postgres_exception(caught.value) == is_ours
    finally:
        postgres.start()


@pytest.mark.postgres
def test_jobs_outlive_the_end_of_every_connection(postgres_lab, postgres):
    lab = postgres_lab
    job = lab.submit({index: ["hold"] for index in range(3)})
    worker = lab.start_worker()
    database = lab.store.engine.url.database
    for index in range(3):
        lab.until_started(job, index)
        lab.until(lambda: postgres.terminate_connections(database), "a connection to end")
        lab.release(job)
    lab.assert_whole(job, starts=[0, 1, 2])
    assert worker.poll() is None


@contextmanager
def no_heartbeat_possible(lab):
    """Every beat has to wait while the block runs; whoever only reads is answered."""
    with lab.store.engine.begin() as connection:
        if queue.is_sqlite(lab.store.engine):
            connection.execute(sa.update(workers).values(name=workers.c.name))
        else:
            connection.execute(sa.text("LOCK TABLE workers IN EXCLUSIVE MODE"))
        yield


def job_of_a_ghost(lab):
    """A job whose worker does not exist: a worker that is entitled to judge takes it."""
    job_id = lab.submit()  # to a queue whose workers are busy or not there, then to the judge's
    ws = queue.workflow_status_table(lab.store.engine)
    with lab.store.engine.begin() as connection:
        connection.execute(
            sa.update(ws)
            .where(ws.c.workflow_uuid == job_id)
            .values(status="PENDING", executor_id="ghost", owner_xid="t", queue_name="cpu")
        )
    return job_id


def test_pitfall_7_no_living_job_is_stolen_after_an_outage_longer_than_the_lease(lab):
    judge = lab.start_worker("judge", machine="-a", queues="cpu", **SHORT)
    wait_for_worker(lab, "judge")
    lab.assert_whole(job_of_a_ghost(lab), starts=[0, 1, 2])
    held = lab.submit({1: ["hold"]})
    lab.start_worker("other", machine="-b", queues="gpu", **SHORT)
    lab.until_started(held, 1)
    with no_heartbeat_possible(lab):
        for name in ("judge", "other"):
            lab.until(lambda name=name: silent_s(lab, name) > 3, f"the lease of {name} to run out")
    lab.assert_whole(job_of_a_ghost(lab), starts=[0, 1, 2])  # it judges again
    assert running_in(lab, held) == "other"
    lab.release(held)
    lab.assert_whole(held, starts=[0, 1, 2])
    assert judge.poll() is None


@pytest.mark.parametrize("module", ["server.worker", "server.api"])
def test_a_start_without_a_database_ends_in_one_sentence(tmp_path, module):
    """No traceback, and no password; a supervisor tries again."""
    environment = {
        "PROBE_DATA_DIR": str(tmp_path),
        "PROBE_DATABASE_URL": f"postgresql://probe:hunter2@/probe?host={tmp_path}/nowhere",
    }
    ran = subprocess.run(
        [sys.executable, "-m", module],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert ran.returncode == 1
    assert "the database does not answer" in ran.stderr
    assert "correct PROBE_DATABASE_URL" in ran.stderr
    assert not any(word in ran.stderr for word in ("Traceback", "hunter2", "alembic"))


@pytest.mark.postgres
def test_a_machine_that_stops_while_it_writes_keeps_no_lock(postgres_lab, tmp_path):
    """Nobody could take its job before it woke up: its transaction held the job's row."""
    lab = postgres_lab
    job_id = lab.submit()
    (tmp_path / "sitecustomize.py").write_text(STOPS_IN_A_TRANSACTION)
    environment = {"PYTHONPATH": str(tmp_path)}
    worker = lab.start_worker("stops", machine="-a", environment=environment, **SHORT)
    state = Path(f"/proc/{worker.pid}/stat")
    lab.until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T", "the stop")
    lab.start_worker("goes-on", machine="-b", **SHORT)
    lab.until_status(job_id, "succeeded")
    assert running_in(lab, job_id) == "goes-on"
    lab.thaw(worker.pid)
    lab.assert_whole(job_id, starts=[0, 1, 2])
    lab.until(lambda: any(w.name == "stops" and w.alive for w in lab.store.list_workers()), "it")
    assert worker.poll() is None
