"""kill -9 of every process at chosen moments: the job goes on, nothing twice, nothing left.

The moments are events, not times: the journal of the fake rank says when a unit has started,
the store when a result is recorded.
"""

import os
import signal
import subprocess
import sys

import pytest

from tests.server.conftest import on_sqlite_only
from tests.server.jobs.conftest import DEADLINE_S, NO_PROGRESS_S


@pytest.mark.parametrize("index", [0, 1, 2])
def test_kill_9_of_the_worker_while_it_measures(lab, index):
    job_id = lab.submit({index: ["silent", "ok"]})
    worker = lab.start_worker()
    lab.until_deaf(job_id, index)  # it does not even look at its socket: the kernel must end it
    lab.kill(worker.pid)
    lab.until(lambda: not lab.processes(), "the gang to end with its worker")
    assert lab.job(job_id).num_units_finished == index
    lab.start_worker()
    lab.assert_whole(job_id, starts=sorted([0, 1, 2, index]))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_another_worker_goes_on_with_the_job_of_one_that_is_gone(lab, end):
    """`probe up` with fewer workers than before, or a container that got a new host name."""
    job_id = lab.submit({1: ["hold"]})
    first = lab.start_worker("first")
    lab.until_started(job_id, 1)
    second = lab.start_worker("second")
    lab.until(lambda: any(w.name == "second" for w in lab.store.list_workers()), "the second")
    assert lab.journal(job_id, "start") == [0, 1]  # not taken from a living worker
    first.send_signal(end)
    first.wait(DEADLINE_S)
    lab.until_started(job_id, 1, times=2)
    lab.release(job_id)
    lab.assert_whole(job_id, starts=[0, 1, 1, 2])
    assert second.poll() is None


@on_sqlite_only
def test_kill_9_of_the_worker_while_a_gang_starts_and_while_a_retry_waits(lab):
    job_id = lab.submit({0: ["error", "ok"]})
    worker = lab.start_worker(rank_command='["sleep", "600"]')
    lab.until(lambda: any("sleep" in line for line in lab.children().values()), "the gang")
    lab.kill(worker.pid)
    lab.until(lambda: not lab.processes(), "the gang to end with its worker")
    worker = lab.start_worker(unit_retry_interval_s=3600)
    lab.until(lambda: "unit.retrying" in lab.event_types(job_id), "the wait before a retry")
    lab.kill(worker.pid)
    lab.start_worker()
    lab.assert_whole(job_id, starts=[0, 0, 1, 2])


def test_a_result_recorded_just_before_the_worker_dies_is_not_measured_again(lab, make_result):
    job_id = lab.submit({1: ["hold"]})
    worker = lab.start_worker()
    lab.until_started(job_id, 1)
    lab.kill(worker.pid)
    # As if the worker had died between its own record and DBOS's: the step is still open.
    unit = lab.store.get_plan(job_id).units[1]
    assert lab.store.record_unit(job_id, make_result(unit, eta_c=4.0))
    lab.start_worker()
    lab.assert_whole(job_id, starts=[0, 1, 2])


@on_sqlite_only
def test_kill_9_of_the_rank(lab):
    job_id = lab.submit({1: ["hold"]})
    lab.start_worker()
    lab.until_started(job_id, 1)
    lab.kill(lab.rank_pid(job_id))
    lab.release(job_id)
    lab.assert_whole(job_id, starts=[0, 1, 1, 2])
    retrying = [e for e in lab.store.events_after(job_id, 0) if e.type == "unit.retrying"]
    assert [event.data["code"] for event in retrying] == ["unit_crashed"]
    assert "killed by signal 9" in retrying[0].data["message"]


def test_a_rank_that_is_stopped_is_ended_and_its_unit_tried_again(lab):
    job_id = lab.submit({1: ["stopped", "ok"]})  # it stops itself: we might come too late
    lab.start_worker(unit_no_progress_s=NO_PROGRESS_S)
    lab.until_deaf(job_id, 1)
    rank = lab.rank_pid(job_id)
    lab.assert_whole(job_id, starts=[0, 1, 1, 2])
    retrying = [e for e in lab.store.events_after(job_id, 0) if e.type == "unit.retrying"]
    assert [event.data["code"] for event in retrying] == ["unit_stalled"]
    assert rank not in lab.processes()


@on_sqlite_only
@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "rank", "agent"])
def test_kill_9_with_a_true_torchrun_between(lab, victim):
    job_id = lab.submit({1: ["hold"]})
    worker = lab.start_worker(torchrun=True)
    lab.until_started(job_id, 1)
    rank = lab.rank_pid(job_id)
    agents = [p for p, line in lab.children().items() if "torch.distributed.run" in line]
    assert len(agents) == 1
    lab.kill({"worker": worker.pid, "rank": rank, "agent": agents[0]}[victim])
    lab.until(lambda: rank not in lab.processes(), "the rank to end")
    lab.release(job_id)
    if victim == "worker":
        lab.until(lambda: not lab.processes(), "the gang to end with its worker")
        lab.start_worker()  # without torchrun: the job does not depend on who starts its ranks
    lab.assert_whole(job_id, starts=[0, 1, 1, 2])


@on_sqlite_only
def test_a_worker_that_dies_before_every_unit_fails_the_job_in_the_end(lab):
    job_id = lab.submit({0: ["hold"]})
    for dispatch in range(1, 4):
        worker = lab.start_worker(max_dispatches=2)
        lab.until_started(job_id, 0, times=dispatch)
        lab.kill(worker.pid)
    lab.start_worker(max_dispatches=2)
    view = lab.until_status(job_id, "failed")
    assert view.error.code == "worker_crash_loop"
    assert lab.event_types(job_id)[-1] == "job.failed"


def test_a_job_that_finishes_units_between_crashes_is_no_crash_loop(lab):
    job_id = lab.submit({index: ["hold", "ok"] for index in range(3)})
    for index in range(3):
        worker = lab.start_worker(max_dispatches=1)
        lab.until_started(job_id, index)
        lab.kill(worker.pid)
    lab.start_worker(max_dispatches=1)
    lab.assert_whole(job_id, starts=[0, 0, 1, 1, 2, 2])


SUBMITTER = """
import json, sys
from probe.result import Plan
from server.store import SqlStore
store = SqlStore(sys.argv[1])
plan = Plan.model_validate_json(sys.stdin.read())
for number in range(10_000):
    store.create_job(plan=plan, idempotency_key=f"key-{number}", body_sha256="0")
    print(number, flush=True)
"""


def test_kill_9_of_a_server_while_it_takes_jobs(lab, make_plan):
    answered = -1
    for _ in range(3):
        server = subprocess.Popen(
            [sys.executable, "-c", SUBMITTER, lab.database_url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        server.stdin.write(make_plan(2).model_dump_json())
        server.stdin.close()
        last = answered
        for line in server.stdout:
            last = int(line)
            if last >= answered + 20:
                break
        os.kill(server.pid, signal.SIGKILL)
        server.wait(DEADLINE_S)
        server.stdout.close()
        answered = last
    # Every job that was answered is there once, is on the queue and has its first event.
    found, after = [], None
    while True:
        page, more = lab.store.list_jobs(status="queued", after=after, limit=50)
        found += page
        if not more:
            break
        after = page[-1].id
    assert len(found) >= answered + 1
    assert len({job.id for job in found}) == len(found)
    assert all(lab.event_types(job.id) == ["job.queued"] for job in found)
