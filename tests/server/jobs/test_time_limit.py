"""A job's time limit, on both databases: whose clock, what it ends, what it keeps."""

import asyncio

import pytest
import sqlalchemy as sa

from server.tables import jobs
from server.worker import time_limit
from server.worker.gang import UnitFailedError

LIMIT_S = 1000.0


def started_ago(store, job_id, seconds):
    """Move a job's first start into the past, which no clock of a worker knows of."""
    with store.engine.begin() as connection:
        moved = sa.update(jobs).where(jobs.c.id == job_id)
        connection.execute(moved.values(started_at=store._now - int(seconds * 1000)))


def test_a_limit_that_passes_in_the_middle_of_a_unit_ends_the_gang_and_fails_the_job(lab):
    acts = {0: ["hold"], 1: ["stubborn"]}  # unit 1 neither answers nor heeds SIGTERM
    job_id, following = lab.submit(acts, time_limit_s=LIMIT_S), lab.submit()
    lab.start_worker(unit_max_attempts=5)
    lab.until_started(job_id, 0)
    started_ago(lab.store, job_id, LIMIT_S - 5)  # time for unit 1 to start
    lab.release(job_id)
    view = lab.until_status(job_id, "failed")
    assert view.error.code == "time_limit_exceeded"
    assert "1000 s have passed" in view.error.message
    assert view.error.unit_id == "0001-step-1"
    assert (view.num_units_finished, view.time_limit_s) == (1, LIMIT_S)
    assert lab.journal(job_id, "start") == [0, 1]  # no second try
    lab.until(lambda: lab.rank_pid(job_id) not in lab.processes(), "the rank to be gone")
    assert lab.event_types(job_id)[-1] == "job.failed"
    lab.until_status(following, "succeeded")


def test_a_job_over_its_limit_when_taken_over_fails_without_a_gang(lab):
    job_id = lab.submit({1: ["hold"]}, time_limit_s=LIMIT_S)
    worker = lab.start_worker()
    lab.until_started(job_id, 1)
    lab.kill(worker.pid)
    started_ago(lab.store, job_id, LIMIT_S)
    lab.start_worker("another")
    view = lab.until_status(job_id, "failed", "succeeded")
    assert (view.status, view.error.code) == ("failed", "time_limit_exceeded")
    assert view.num_units_finished == 1
    assert lab.journal(job_id, "start") == [0, 1]  # only the first worker's


def test_a_job_whose_units_are_all_finished_is_not_over_its_limit(lab):
    job_id = lab.submit({0: ["hold"]}, num_units=1, time_limit_s=LIMIT_S)
    lab.start_worker()
    lab.until_started(job_id, 0)
    started_ago(lab.store, job_id, 2 * LIMIT_S)
    lab.release(job_id)
    assert lab.until_status(job_id, "succeeded", "failed").status == "succeeded"


def test_time_that_a_job_waits_for_a_worker_counts_from_its_first_start_only(store, make_plan):
    view, _ = store.create_job(
        plan=make_plan(time_limit_s=LIMIT_S), idempotency_key=None, body_sha256="0"
    )
    assert time_limit.seconds_since_start(store.engine, view.id) == 0
    store.mark_running(view.id, "w")
    started_ago(store, view.id, 50)
    passed_s = time_limit.seconds_since_start(store.engine, view.id)
    assert 50 <= passed_s < 110
    store.mark_running(view.id, "another")
    assert time_limit.seconds_since_start(store.engine, view.id) >= passed_s


def test_only_the_limit_itself_counts_as_the_limit():
    async def endless():
        async with time_limit.within(1.0, 0.99):
            await asyncio.Event().wait()

    async def another_timeout(limit_s):
        async with time_limit.within(limit_s, 0.0):
            raise TimeoutError("of a socket")

    with pytest.raises(UnitFailedError, match="1 s have passed") as caught:
        asyncio.run(endless())
    assert (caught.value.code, caught.value.retryable) == ("time_limit_exceeded", False)
    for limit_s in (None, 60.0):
        with pytest.raises(TimeoutError, match="of a socket"):
            asyncio.run(another_timeout(limit_s))


def test_the_limit_is_never_entered_when_it_has_passed():
    async def enter():
        async with time_limit.within(5.0, 5.0):
            pytest.fail("entered")

    with pytest.raises(UnitFailedError):
        asyncio.run(enter())
