"""Workers as real processes: order, hints, retries, failures, queues, names, orderly stops."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.worker.processes import marked_processes
from tests.server.conftest import on_sqlite_only
from tests.server.jobs.conftest import DEADLINE_S, NO_PROGRESS_S

# Unit k of the fake rank has eta_c = 2 * (hint from unit k - 1), the first one 2 * 1.0.
EXPECTED_ETA_C = [2.0, 4.0, 8.0]


def eta_c(lab: Any, job_id: str) -> list[float | None]:
    return [result.measurements[0].eta_c for result in lab.store.unit_results(job_id)]


def test_a_job_runs_its_units_in_order_and_tells_what_it_does(lab):
    job_id = lab.submit()
    lab.start_worker()
    view = lab.until_status(job_id, "succeeded", "failed")
    assert view.status == "succeeded"
    assert (view.num_units, view.num_units_finished, view.num_forward_passes) == (3, 3, 12)
    assert view.created_at <= view.started_at <= view.finished_at
    assert eta_c(lab, job_id) == EXPECTED_ETA_C
    assert lab.journal(job_id, "next") == [1, 2]  # what each rank may fetch ahead
    events = lab.store.events_after(job_id, 0)
    assert [event.id for event in events] == list(range(1, len(events) + 1))
    types = [event.type for event in events if event.type != "unit.progress"]
    units = ["unit.started", "unit.finished"] * 3
    assert types == ["job.queued", "job.running", *units, "job.succeeded"]
    assert "unit.progress" in [event.type for event in events]
    lab.until(lambda: not lab.children(), "the gang to be gone")
    worker = lab.store.list_workers()[0]
    assert (worker.name, worker.alive, worker.queues) == ("w", True, ["gpu", "cpu"])


@on_sqlite_only
def test_what_can_help_is_tried_again_and_the_numbers_stay_the_same(lab):
    job_id = lab.submit({0: ["error", "ok"], 1: ["exit", "nonsense"], 2: ["error", "exit", "ok"]})
    lab.start_worker()
    view = lab.until_status(job_id, "succeeded", "failed")
    # A malformed result is our own mistake: no second try, the finished unit is kept.
    assert view.status == "failed"
    assert view.error.code == "invalid_result"
    assert view.error.unit_id == "0001-step-1"
    assert lab.journal(job_id, "start") == [0, 0, 1, 1]
    assert eta_c(lab, job_id) == EXPECTED_ETA_C[:1]
    types = lab.event_types(job_id)
    assert types.count("unit.retrying") == 2
    assert types.count("job.failed") == 1
    assert types[-1] == "job.failed"


@on_sqlite_only
def test_a_unit_that_keeps_failing_fails_the_job_with_its_error_and_the_logs_end(lab):
    job_id = lab.submit({1: ["error", "exit", "exit"]})
    lab.start_worker()
    view = lab.until_status(job_id, "succeeded", "failed")
    assert view.status == "failed"
    assert view.error.code == "unit_crashed"
    assert "exit status 3" in view.error.message
    assert "the rank says goodbye" in view.error.message
    assert lab.journal(job_id, "start") == [0, 1, 1, 1]
    assert view.num_units_finished == 1
    retrying = [e for e in lab.store.events_after(job_id, 0) if e.type == "unit.retrying"]
    assert [event.data["code"] for event in retrying] == ["fake_error", "unit_crashed"]
    assert [event.data["wait_s"] for event in retrying] == [0.05, 0.1]


@on_sqlite_only
def test_an_error_no_retry_can_help_fails_at_once_and_the_next_job_runs(lab):
    failing, following = lab.submit({0: ["fatal"]}), lab.submit()
    lab.start_worker()
    view = lab.until_status(failing, "failed")
    assert (view.error.code, view.error.message) == ("fake_error", "fatal in 0000-step-0")
    assert lab.journal(failing, "start") == [0]
    assert lab.until_status(following, "succeeded", "failed").status == "succeeded"


@on_sqlite_only
def test_a_silent_rank_is_ended_and_its_unit_tried_again(lab):
    job_id = lab.submit({1: ["silent", "ok"]})
    lab.start_worker(unit_no_progress_s=NO_PROGRESS_S)
    assert lab.until_status(job_id, "succeeded", "failed").status == "succeeded"
    assert lab.journal(job_id, "start") == [0, 1, 1, 2]
    assert eta_c(lab, job_id) == EXPECTED_ETA_C


@on_sqlite_only
def test_a_gang_that_cannot_start_fails_the_job_with_a_reason(lab):
    job_id = lab.submit()
    lab.start_worker(rank_command='["/nowhere/rank"]')
    view = lab.until_status(job_id, "failed")
    assert view.error.code == "unit_crashed"
    assert "/nowhere/rank" in view.error.message


def test_one_gpu_job_at_a_time_while_the_cpu_queue_goes_on(lab):
    first, second = lab.submit({0: ["hold"]}), lab.submit()
    on_cpu = lab.submit(device="cpu")
    lab.start_worker()
    lab.until_started(first, 0)
    lab.until_status(on_cpu, "succeeded")
    assert (lab.job(first).status, lab.job(second).status) == ("running", "queued")
    lab.release(first)
    lab.until_status(second, "succeeded")
    assert lab.job(first).status == "succeeded"


def test_a_worker_takes_jobs_only_from_its_queues(lab):
    on_gpu, on_cpu = lab.submit(), lab.submit(device="cpu")
    lab.start_worker(queues="cpu")
    lab.until_status(on_cpu, "succeeded")
    assert lab.job(on_gpu).status == "queued"


def test_cancelling_ends_a_running_jobs_gang_and_keeps_finished_units(lab):
    job_id, following = lab.submit({1: ["stubborn"]}), lab.submit()
    worker = lab.start_worker()
    lab.until_deaf(job_id, 1)
    assert lab.store.cancel_job(job_id).status == "cancelled"
    lab.until_status(following, "succeeded")
    assert not set(lab.children()) & {lab.rank_pid(job_id)}
    view = lab.store.cancel_job(job_id)
    assert (view.status, view.num_units_finished, view.error) == ("cancelled", 1, None)
    lab.kill(worker.pid)
    lab.start_worker()
    third = lab.submit()
    lab.until_status(third, "succeeded")
    assert lab.job(job_id).status == "cancelled"
    assert lab.journal(job_id, "start") == [0, 1]
    types = lab.event_types(job_id)
    assert (types[-1], types.count("job.cancelled")) == ("job.cancelled", 1)


def test_a_job_cancelled_while_queued_or_while_waiting_to_retry_never_goes_on(lab):
    queued = lab.submit()
    lab.store.cancel_job(queued)
    waiting, following = lab.submit({0: ["error"]}), lab.submit()
    lab.start_worker(unit_retry_interval_s=3600)
    lab.until(lambda: "unit.retrying" in lab.event_types(waiting), "the wait before a retry")
    lab.store.cancel_job(waiting)
    lab.until_status(following, "succeeded")
    assert lab.journal(queued, "start") == []
    assert lab.journal(waiting, "start") == [0]
    assert lab.job(queued).status == lab.job(waiting).status == "cancelled"


def stop_by_sigterm(lab: Any, worker: Any, rank: int) -> None:
    worker.send_signal(signal.SIGTERM)


def stop_by_ctrl_c(lab: Any, worker: Any, rank: int) -> None:
    os.killpg(worker.pid, signal.SIGINT)  # a terminal sends it to every process of the group


def stop_as_a_machine_does(lab: Any, worker: Any, rank: int) -> None:
    os.kill(rank, signal.SIGKILL)
    lab.until(lambda: not Path(f"/proc/{rank}").exists(), "the worker to see its rank's end")
    worker.send_signal(signal.SIGTERM)


@on_sqlite_only
@pytest.mark.parametrize(
    ("stop", "act"),
    [(stop_by_sigterm, "stubborn"), (stop_by_ctrl_c, "hold"), (stop_as_a_machine_does, "silent")],
)
def test_a_stopped_worker_leaves_its_job_for_the_next_start(lab, stop, act):
    job_id = lab.submit({1: [act, "ok"]})
    worker = lab.start_worker(unit_max_attempts=1)
    lab.until_started(job_id, 1)
    if act != "hold":
        lab.until_deaf(job_id, 1)
    stop(lab, worker, lab.rank_pid(job_id))
    assert worker.wait(DEADLINE_S) == 0, lab.output()
    assert lab.processes() == {}
    assert lab.job(job_id).status == "running"
    assert [view.alive for view in lab.store.list_workers()] == [False]
    lab.start_worker()
    assert lab.until_status(job_id, "succeeded", "failed").status == "succeeded"
    assert lab.journal(job_id, "start") == [0, 1, 1, 2]
    assert eta_c(lab, job_id) == EXPECTED_ETA_C
    assert "unit.retrying" not in lab.event_types(job_id)
    assert "Traceback" not in lab.output()
    assert "KeyboardInterrupt" not in (lab.data_dir / "logs" / f"{job_id}.log").read_text()


def test_two_workers_of_one_name_cannot_run(lab):
    lab.start_worker()
    lab.until(lab.store.list_workers, "the first worker")
    second = lab.start_worker()
    assert second.wait(DEADLINE_S) == 1
    assert "use --name" in lab.output()


def test_the_worker_never_imports_torch():
    code = "import sys, server.worker.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_a_mark_that_nobody_carries_finds_nothing():
    assert marked_processes("no such gang") == []
