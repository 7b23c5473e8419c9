"""Other workers take over what a silent one has, and it does no harm when it wakes up.

`machine` is a data directory of its own: what its workers know of each other is the database.
The numbers of the tests' names are those of `docs/queue.md`, "What can go wrong".
"""

import os
import signal
import subprocess
import sys

import pytest
import sqlalchemy as sa

from server import queue, tables
from server.tables import workers
from tests.server.jobs.conftest import DEADLINE_S

SHORT = {"heartbeat_s": 0.2, "worker_stale_s": 2.0}


def workflow(lab, job_id):
    ws = queue.workflow_status_table(lab.store.engine)
    table = sa.Table(
        "workflow_status", sa.MetaData(schema=ws.schema), autoload_with=lab.store.engine
    )
    with lab.store.engine.connect() as connection:
        query = sa.select(table).where(table.c.workflow_uuid == job_id)
        return connection.execute(query).one()


def running_in(lab, job_id):
    return workflow(lab, job_id).executor_id


def silent_s(lab, name):
    silent_ms = tables.now_ms(lab.store.engine) - workers.c.last_heartbeat
    with lab.store.engine.connect() as connection:
        return connection.scalar(sa.select(silent_ms).where(workers.c.name == name)) / 1000


def wait_for_worker(lab, name):
    def alive():
        return any(w.name == name and w.alive for w in lab.store.list_workers())

    lab.until(alive, f"worker {name}")


def test_pitfall_2_a_worker_elsewhere_takes_over_when_the_lease_has_run_out(lab):
    """And keeps the job's queue and priority, and counts the dispatch (pitfall 3)."""
    job_id = lab.submit({1: ["hold"]}, priority=7)
    first = lab.start_worker("first", machine="-a", **SHORT)
    lab.until_started(job_id, 1)
    before = workflow(lab, job_id)
    lab.start_worker("second", machine="-b", **SHORT)
    wait_for_worker(lab, "second")
    assert running_in(lab, job_id) == "first"
    lab.kill(first.pid)
    lab.until_started(job_id, 1, times=2)
    after = workflow(lab, job_id)
    assert (before.executor_id, after.executor_id) == ("first", "second")
    assert (after.queue_name, after.priority) == (before.queue_name, before.priority) == ("gpu", 7)
    assert after.recovery_attempts >= before.recovery_attempts
    lab.release(job_id)
    lab.assert_whole(job_id, starts=[0, 1, 1, 2])


def test_a_worker_of_other_queues_puts_a_dead_ones_job_back(lab):
    job_id = lab.submit({0: ["hold"]})
    first = lab.start_worker("first", machine="-a", **SHORT)
    lab.until_started(job_id, 0)
    lab.start_worker("second", machine="-b", queues="cpu", **SHORT)
    wait_for_worker(lab, "second")
    lab.kill(first.pid)
    lab.until_status(job_id, "queued")
    lab.release(job_id)
    lab.start_worker("third", machine="-c", **SHORT)
    lab.assert_whole(job_id, starts=[0, 0, 1, 2])


def test_pitfall_8_a_worker_stopped_for_longer_than_its_lease_does_no_harm(lab):
    """Its ranks are gone soon after it wakes up, and nothing they say is written."""
    job_id = lab.submit({1: ["hold"]}, num_units=3)
    first = lab.start_worker("first", machine="-a", **SHORT)
    lab.until_started(job_id, 1)
    rank = lab.rank_pid(job_id)
    lab.freeze(first.pid)
    lab.start_worker("second", machine="-b", **SHORT)
    lab.until_started(job_id, 1, times=2)
    taken = lab.store.events_after(job_id, 0)[-1].id
    # Both ranks finish the unit: what the first one says of it waits for its worker to wake up.
    second_rank = lab.rank_pid(job_id)
    lab.freeze(second_rank)
    lab.release(job_id)
    lab.until(lambda: lab.journal(job_id, "done").count(1) == 1, "the unit of the zombie")
    lab.thaw(first.pid)
    lab.until(lambda: rank not in lab.processes(), "the zombie's rank to be gone")
    assert lab.store.unit_results(job_id)[1:] == []  # a result came, and was not taken
    lab.thaw(second_rank)
    lab.assert_whole(job_id, starts=[0, 1, 1, 2])
    told = [e for e in lab.store.events_after(job_id, taken) if e.type == "job.running"]
    assert [event.data["worker"] for event in told] in ([], ["second"])
    assert running_in(lab, job_id) == "second"
    # The one that woke up works on, with new jobs.
    following = [lab.submit({0: ["hold"]}) for _ in range(2)]
    for job in following:
        lab.until_started(job, 0)
    assert {running_in(lab, job) for job in following} == {"first", "second"}
    for job in following:
        lab.release(job)
        lab.assert_whole(job, starts=[0, 1, 2])


def test_pitfall_3_a_cancelled_job_stays_cancelled_through_a_take_over(lab):
    cancelled, following = lab.submit({1: ["hold"]}), lab.submit({0: ["hold"]}, device="cpu")
    first = lab.start_worker("first", machine="-a", **SHORT)
    lab.until_started(cancelled, 1)
    lab.until_started(following, 0)
    lab.freeze(first.pid)
    assert lab.store.cancel_job(cancelled).status == "cancelled"
    lab.start_worker("second", machine="-b", **SHORT)
    lab.until_started(following, 0, times=2)  # the take-over has happened
    lab.thaw(first.pid)
    lab.release(following)
    assert lab.until_status(following, "succeeded", "failed").status == "succeeded"
    lab.until(lambda: not lab.children(), "the gangs to be gone")
    assert lab.job(cancelled).status == "cancelled"
    assert lab.journal(cancelled, "start") == [0, 1]
    types = lab.event_types(cancelled)
    assert (types[-1], types.count("job.cancelled")) == ("job.cancelled", 1)


def test_a_name_taken_over_elsewhere_ends_the_worker_that_had_it(lab):
    job_id = lab.submit({1: ["hold"]})
    first = lab.start_worker("w", machine="-a", **SHORT)
    lab.until_started(job_id, 1)
    early = lab.start_worker("w", machine="-b", **SHORT)
    assert early.wait(DEADLINE_S) == 1  # the name is held
    assert f"process {first.pid}" in lab.output()
    lab.freeze(first.pid)
    lab.until(lambda: silent_s(lab, "w") > SHORT["worker_stale_s"], "the lease to run out")
    lab.start_worker("w", machine="-b", **SHORT)
    lab.until_started(job_id, 1, times=2)
    lab.thaw(first.pid)
    assert first.wait(DEADLINE_S) == 1
    assert "silent for longer than a lease lasts" in lab.output()
    lab.release(job_id)
    lab.assert_whole(job_id, starts=[0, 1, 1, 2])


def test_a_lock_left_behind_says_nothing_of_a_namesake_elsewhere(lab):
    """A worker that has moved to another directory is alive, though its old lock is free."""
    moved = lab.start_worker("w", machine="-a", heartbeat_s=0.2)
    wait_for_worker(lab, "w")
    moved.terminate()
    assert moved.wait(DEADLINE_S) == 0
    lab.start_worker("w", machine="-b", heartbeat_s=0.2)
    job_id = lab.submit({1: ["hold"]})
    lab.until_started(job_id, 1)
    lab.start_worker("other", machine="-a", heartbeat_s=0.2)
    wait_for_worker(lab, "other")
    beats = next_beats(lab, "other", 3)
    assert (beats, running_in(lab, job_id)) == (3, "w")
    lab.release(job_id)
    lab.assert_whole(job_id, starts=[0, 1, 2])


def next_beats(lab, name, number):
    """Wait for so many heartbeats of a worker; how many there were."""
    seen = set()

    def heard_of():
        seen.update(w.last_heartbeat for w in lab.store.list_workers() if w.name == name)
        return len(seen) > number

    lab.until(heard_of, f"{number} heartbeats of {name}")
    return len(seen) - 1


def test_a_job_that_the_queue_has_lost_is_brought_back_by_a_new_start(lab):
    """The watchdog: ours by the database, unknown to the process, so nobody would take it."""
    # Of another queue until the next statement, so that it is not taken before.
    lab.start_worker("w", heartbeat_s=0.2, queues="cpu")
    wait_for_worker(lab, "w")
    pid = lab.store.list_workers()[0].pid
    job_id = lab.submit()
    ws = queue.workflow_status_table(lab.store.engine)
    with lab.store.engine.begin() as connection:
        connection.execute(
            sa.update(ws)
            .where(ws.c.workflow_uuid == job_id)
            .values(
                status="PENDING",
                executor_id="w",
                owner_xid="of a task that died",
                queue_name="cpu",
            )
        )
    lab.assert_whole(job_id, starts=[0, 1, 2])
    assert lab.store.list_workers()[0].pid == pid  # a new program in the same process
    assert "starting again" in lab.output()
    assert lab.workers[0].poll() is None


def test_pitfall_4_a_job_queued_by_other_code_is_taken(lab, tmp_path):
    """The application version is fixed; DBOS's own would be a hash of the worker's code."""
    job_id = lab.submit()
    assert workflow(lab, job_id).application_version == queue.APP_VERSION
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "sitecustomize.py").write_text(
        "import server.worker.job_runner as j\n"
        "async def other(self, *a): return await original(self, *a)\n"
        "original, j.JobRunner.run_unit = j.JobRunner.run_unit, other\n"
    )
    lab.start_worker(environment={"PYTHONPATH": str(changed)})
    lab.assert_whole(job_id, starts=[0, 1, 2])
    assert workflow(lab, job_id).application_version == queue.APP_VERSION


def test_pitfall_5_no_job_is_ever_queued_without_a_priority(lab):
    jobs = [lab.submit(), lab.submit(priority=1), lab.submit(priority=10_000)]
    assert [workflow(lab, job).priority for job in jobs] == [100, 1, 10_000]


def test_contract_with_dbos_recovery_changes_only_running_rows_of_the_dead(lab):
    """What the take-over relies on, of a private call of DBOS and of what we read."""
    lab.start_worker("w", queues="cpu")  # it takes none of these, all are for the gpu
    wait_for_worker(lab, "w")
    jobs = {name: lab.submit(priority=9) for name in ("dead", "alive", "done", "cancelled", "new")}
    ws = queue.workflow_status_table(lab.store.engine)
    states = {
        "dead": {"status": "PENDING", "executor_id": "dead"},
        "alive": {"status": "PENDING", "executor_id": "alive"},
        "done": {"status": "SUCCESS", "executor_id": "dead"},
        "cancelled": {"status": "CANCELLED", "executor_id": "dead"},
    }
    with lab.store.engine.begin() as connection:
        for name, values in states.items():
            values |= {"recovery_attempts": 3, "owner_xid": "t"}
            change = sa.update(ws).where(ws.c.workflow_uuid == jobs[name]).values(**values)
            connection.execute(change)
    before = {name: workflow(lab, job) for name, job in jobs.items()}
    done = subprocess.run(
        [sys.executable, "-c", RECOVERER, lab.database_url],
        env=os.environ | {"PROBE_TEST_RUN": lab.mark},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    after = {name: workflow(lab, job) for name, job in jobs.items()}
    for name in ("alive", "done", "cancelled", "new"):
        assert after[name] == before[name], name
    row = after["dead"]
    assert (row.status, row.owner_xid) == ("ENQUEUED", None)
    assert (row.queue_name, row.priority, row.recovery_attempts) == ("gpu", 9, 3)


RECOVERER = """
import sys
from dbos import DBOS
from server import queue
engine = queue.create_engine(sys.argv[1])
DBOS(config=queue.worker_config(engine, sys.argv[1], "reaper"))
DBOS.listen_queues([])
DBOS.launch()
DBOS._recover_pending_workflows(["dead"])
assert queue.active_ids() == set()
DBOS.destroy()
engine.dispose()
"""


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_a_restarted_worker_needs_not_wait_for_its_own_lease(lab, signal_number):
    """Its lock file proves that the one before is gone, whose lease still runs for a minute."""
    job_id = lab.submit({0: ["hold", "ok"]})
    worker = lab.start_worker()
    lab.until_started(job_id, 0)
    worker.send_signal(signal_number)
    worker.wait(DEADLINE_S)
    with lab.store.engine.connect() as connection:
        stopped = connection.scalar(sa.select(workers.c.stopped))
    assert stopped == (signal_number == signal.SIGTERM)
    lab.start_worker()
    lab.assert_whole(job_id, starts=[0, 0, 1, 2])


def test_a_job_comes_back_to_the_worker_that_slept(lab):
    """One process then has two executions of it: the first ends before the second begins."""
    job_id = lab.submit({1: ["hold", "hold"]})
    worker = lab.start_worker("w", machine="-a", **SHORT)
    lab.until_started(job_id, 1)
    first_rank = lab.rank_pid(job_id)
    lab.freeze(worker.pid)
    lab.start_worker("of-another-queue", machine="-b", queues="cpu", **SHORT)
    lab.until_status(job_id, "queued")
    lab.thaw(worker.pid)
    lab.until_started(job_id, 1, times=2)
    assert first_rank not in lab.processes()
    assert running_in(lab, job_id) == "w"
    lab.release(job_id)
    lab.assert_whole(job_id, starts=[0, 1, 1, 2])
    assert worker.poll() is None
