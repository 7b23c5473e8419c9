"""In which order workers take jobs, and how many at once; on both databases."""

import inspect

from dbos import _queue, _sys_db

from server.wire import TERMINAL


def first_started(lab, job_ids):
    views = [lab.job(job_id) for job_id in job_ids]
    return [view.id for view in sorted(views, key=lambda view: view.started_at)]


def test_a_lower_priority_number_goes_first_and_equal_ones_by_age(lab):
    numbers = [10_000, 100, 1, None, 1, 10_000]
    jobs = [lab.submit(num_units=1, **({} if n is None else {"priority": n})) for n in numbers]
    assert [lab.job(job_id).priority for job_id in jobs] == [10_000, 100, 1, 100, 1, 10_000]
    lab.start_worker()
    for job_id in jobs:
        assert lab.until_status(job_id, *TERMINAL).status == "succeeded"
    assert first_started(lab, jobs) == [jobs[k] for k in (2, 4, 1, 3, 0, 5)]


def test_no_more_cpu_jobs_at_once_than_slots_and_one_gpu_job(lab):
    on_cpu = [lab.submit({0: ["hold"]}, num_units=1, device="cpu") for _ in range(5)]
    on_gpu = [lab.submit({0: ["hold"]}, num_units=1) for _ in range(2)]
    lab.start_worker(cpu_slots=3)
    for job_id in (*on_cpu[:3], on_gpu[0]):
        lab.until_started(job_id, 0)
    # One slot after another is freed; what starts in it is the only one that does.
    for number, job_id in enumerate(on_cpu):
        lab.release(job_id)
        lab.until_status(job_id, "succeeded")
        following = on_cpu[number + 3 : number + 4]
        for later in following:
            lab.until_started(later, 0)
        running = [view.id for view in lab.store.list_jobs(status="running")[0]]
        assert set(running) == {*on_cpu[number + 1 : number + 4], on_gpu[0]}
    assert lab.job(on_gpu[1]).status == "queued"
    lab.release(on_gpu[0])
    lab.until_started(on_gpu[1], 0)
    lab.release(on_gpu[1])
    assert lab.until_status(on_gpu[1], *TERMINAL).status == "succeeded"


def test_a_running_jobs_view_names_its_worker(lab):
    job_id = lab.submit({0: ["hold"]}, num_units=1, device="cpu")
    assert (lab.job(job_id).queue, lab.job(job_id).worker) == ("cpu", None)
    lab.start_worker("box-7")
    lab.until_started(job_id, 0)
    assert lab.job(job_id).worker == "box-7"
    lab.release(job_id)
    assert lab.until_status(job_id, *TERMINAL).worker is None


def test_every_worker_has_its_own_number_of_slots(lab):
    # DBOS stores one number per queue; the worker that comes last must not decide for the first.
    jobs = [lab.submit({0: ["hold"]}, num_units=1, device="cpu") for _ in range(6)]
    lab.start_worker("three", cpu_slots=3)
    for job_id in jobs[:3]:
        lab.until_started(job_id, 0)
    lab.start_worker("one", cpu_slots=1)
    lab.until_started(jobs[3], 0)
    by_name = {worker.name: worker.slots for worker in lab.store.list_workers()}
    assert by_name == {"three": {"gpu": 1, "cpu": 3}, "one": {"gpu": 1, "cpu": 1}}
    # A slot of the first one is free: the fifth job goes there, and no job anywhere else.
    lab.release(jobs[0])
    lab.until_started(jobs[4], 0)
    running = {view.id: view.worker for view in lab.store.list_jobs(status="running")[0]}
    assert running == {jobs[1]: "three", jobs[2]: "three", jobs[3]: "one", jobs[4]: "three"}
    assert lab.job(jobs[5]).queue_position == 1
    for job_id in jobs[1:]:
        lab.release(job_id)
    for job_id in jobs:
        assert lab.until_status(job_id, *TERMINAL).status == "succeeded"


def test_what_the_slots_hang_on_in_dbos_is_there():
    """The contract: every poll asks `get_queue` and obeys the number in what it returns."""
    source = inspect.getsource(_queue.queue_worker_thread)
    assert "dbos._sys_db.get_queue(queue.name)" in source
    assert "_worker_concurrency - local_running_count" in inspect.getsource(_sys_db.SystemDatabase)
