"""Place in the queue and estimated start: the arithmetic by hand, the queries on both databases."""

import datetime as dt

import pytest
import sqlalchemy as sa

from server import queue, tables
from server.queue_position import Experience, Finished, Forecast, remaining_s, starts
from server.store import SqlStore
from server.tables import jobs, workers
from server.wire import WorkerView

STALE_S = 60.0


def test_jobs_go_to_the_slot_that_is_free_first():
    # Slots are free after 10 and 30 s. 20 s in the first until 30; 5 s in it until 35, as the
    # first of two that are free at 30; 50 s in the other until 80; the next one would start at 35.
    assert starts(2, [10, 30], [20, 5, 50]) == [10, 30, 30, 35]


def test_one_slot_runs_jobs_one_after_another():
    assert starts(1, [7], [1, 2, 3]) == [7, 8, 10, 13]


def test_free_slots_start_jobs_at_once():
    assert starts(3, [], [5, 6]) == [0, 0, 0]
    assert starts(1, [], []) == [0]


def test_a_job_that_waits_to_be_taken_over_goes_before_the_queued_ones():
    assert starts(1, [10, 4], [1]) == [14, 15]


def test_a_running_job_needs_as_long_per_unit_as_so_far():
    assert remaining_s(30, 0.25, 1000) == pytest.approx(90)  # a quarter took 30 s
    assert remaining_s(30, 1.0, 1000) == 0
    assert remaining_s(30, 0.0, 100) == 70  # no unit yet: what others took
    assert remaining_s(300, 0.0, 100) == 0


def test_the_median_job_of_a_kind_is_scaled_by_the_planned_passes():
    series = [Finished("checkpoint_series", p, t) for p, t in ((10, 20.0), (10, 30.0), (1, 9.0))]
    experience = Experience([*series, Finished("mix_scan", 100, 7.0)])
    assert experience.duration_s("checkpoint_series", 40) == 40 * 3  # of 2, 3 and 9 s per pass
    assert experience.duration_s("checkpoint_series", 0) == 20  # of 9, 20 and 30 s
    assert experience.duration_s("mix_scan", 50) == pytest.approx(3.5)
    # A kind that never ran: 0.07, 2, 3 and 9 s per pass.
    assert experience.duration_s("mix_train", 2) == pytest.approx(2 * 2.5)
    assert Experience([Finished("mix_scan", 0, 7.0)]).duration_s("mix_scan", 50) == 7
    assert Experience([]).duration_s("mix_scan", 50) is None


@pytest.fixture
def forecast(store):
    return Forecast(store.engine, STALE_S, keep_s=0)


@pytest.fixture
def create(store, make_plan):
    def create(num_units=1, **spec):
        plan = make_plan(num_units, **spec)
        return store.create_job(plan=plan, idempotency_key=None, body_sha256="0")[0].id

    return create


def set_status(store, job_id, status, **columns):
    workflows = queue.workflow_status_table(store.engine)
    with store.engine.begin() as connection:
        own = workflows.c.workflow_uuid == job_id
        connection.execute(sa.update(workflows).where(own).values(status=status))
        if columns:
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(**columns))


def set_worker(store, name, *, silent_s=0.0, stopped=False, **view):
    now = dt.datetime.now(dt.UTC)
    known = {"queues": ["gpu", "cpu"], "slots": {"gpu": 1, "cpu": 2}}
    shown = WorkerView.model_validate(
        {"name": name, "hostname": "h", "pid": 1, "device": "cpu", "alive": True}
        | {"started_at": now, "last_heartbeat": now}
        | known
        | view
    )
    with store.engine.begin() as connection:
        connection.execute(
            sa.insert(workers).values(
                name=name,
                last_heartbeat=tables.now_ms(store.engine) - int(silent_s * 1000),
                stopped=stopped,
                view=shown.model_dump(mode="json"),
            )
        )


def succeeded(store, create, duration_s, **spec):
    job_id = create(**spec)
    set_status(store, job_id, "SUCCESS", started_at=1000, ended_at=1000 + int(duration_s * 1000))
    with store.engine.begin() as connection:
        ended = sa.update(jobs).where(jobs.c.id == job_id).values(end_event="job.succeeded")
        connection.execute(ended)


def stop_clock(forecast):
    """The time in ms at which the forecast's clock stands from now on."""
    with forecast._engine.connect() as connection:
        now_ms = connection.scalar(sa.select(forecast._now))
    forecast._now = sa.literal(now_ms, sa.BigInteger)
    return now_ms


def seconds_until_start(forecast, view):
    start = forecast.add_to([view])[0].estimated_start
    with forecast._engine.connect() as connection:
        now_ms = connection.scalar(sa.select(forecast._now))
    return start.timestamp() - now_ms / 1000


def test_places_are_by_priority_then_age_within_a_queue_whoever_asks(store, create):
    numbers = [100, 10_000, 1, 100, 1]
    ids = [create(priority=number) for number in numbers]
    on_cpu = create(device="cpu")
    running = create(priority=1)
    set_status(store, running, "PENDING")
    expected = dict(zip(ids, [3, 5, 1, 4, 2], strict=True)) | {on_cpu: 1}
    assert {job_id: store.get_job(job_id).queue_position for job_id in expected} == expected
    listed = {view.id: view.queue_position for view in store.list_jobs()[0]}
    assert listed == expected | {running: None}
    assert store.list_jobs(limit=2)[0][1].queue_position == 1  # the others are not on the page
    set_status(store, ids[2], "CANCELLED")
    assert store.get_job(ids[4]).queue_position == 1
    assert store.get_job(ids[2]).queue_position is None


def test_a_start_is_estimated_from_workers_running_jobs_and_what_has_finished(
    store, create, forecast, make_result
):
    for duration_s in (10, 20, 60):  # median 20 s for one unit of 4 planned passes
        succeeded(store, create, duration_s, device="cpu")
    set_worker(store, "w")  # two slots for cpu jobs
    running = [create(num_units=n, device="cpu") for n in (4, 1)]
    now = stop_clock(forecast)
    set_status(store, running[0], "PENDING", started_at=now - 30_000)
    store.record_unit(running[0], make_result(store.get_plan(running[0]).units[0]))
    set_status(store, running[1], "PENDING", started_at=now - 15_000)
    queued = [store.get_job(create(device="cpu", num_units=n)) for n in (3, 1)]
    # Slots are free after 30 * 3 = 90 and 20 - 15 = 5 s; the first one takes 3 * 20 s from 5 on.
    assert seconds_until_start(forecast, queued[0]) == pytest.approx(5, abs=1e-3)
    assert seconds_until_start(forecast, queued[1]) == pytest.approx(65, abs=1e-3)
    assert forecast.add_to([store.get_job(running[0])])[0].estimated_start is None


@pytest.mark.parametrize(
    "worker",
    [
        None,
        {"stopped": True},
        {"silent_s": STALE_S + 10},
        {"queues": ["cpu"]},
    ],
)
def test_no_live_worker_of_the_queue_means_no_estimate(store, create, forecast, worker):
    succeeded(store, create, 10)
    if worker is not None:
        set_worker(store, "w", **worker)
    view = store.get_job(create())
    assert (view.queue_position, forecast.add_to([view])[0].estimated_start) == (1, None)
    set_worker(store, "live")
    assert seconds_until_start(forecast, view) <= 0


def test_nothing_finished_in_the_queue_means_no_estimate(store, create, forecast):
    set_worker(store, "w")
    succeeded(store, create, 10, device="cpu")
    view = store.get_job(create())
    assert forecast.add_to([view])[0].estimated_start is None
    succeeded(store, create, 10)
    assert forecast.add_to([view])[0].estimated_start is not None


def test_a_worker_of_an_older_release_counts_as_one_slot(store, create, forecast):
    succeeded(store, create, 10)
    set_worker(store, "w", slots={})
    running = create()
    set_status(store, running, "PENDING", started_at=stop_clock(forecast) - 4000)
    assert seconds_until_start(forecast, store.get_job(create())) == pytest.approx(6, abs=1e-3)


def test_an_estimate_is_made_once_for_all_who_ask_within_its_time(store, create, monkeypatch):
    succeeded(store, create, 10)
    set_worker(store, "w")
    views = [store.get_job(create()) for _ in range(5)]
    kept = Forecast(store.engine, STALE_S, keep_s=3600)
    made = []
    estimate = kept._estimate
    monkeypatch.setattr(kept, "_estimate", lambda *a: made.append(a) or estimate(*a))
    first = kept.add_to(views)
    later = kept.add_to([store.get_job(create())])[0]
    assert len(made) == 1
    starts_at = [view.estimated_start for view in first]
    assert starts_at == [starts_at[0] + k * dt.timedelta(seconds=10) for k in range(5)]
    # It came after the estimate: behind all that was seen.
    assert later.queue_position == 6
    assert later.estimated_start == starts_at[0] + dt.timedelta(seconds=50)


def test_no_query_reads_what_has_ended_beyond_the_latest(tmp_path, make_plan):
    store = SqlStore(f"sqlite:///{tmp_path / 'probe.db'}")
    view = store.create_job(plan=make_plan(1), idempotency_key=None, body_sha256="0")[0]
    forecast = Forecast(store.engine, STALE_S)
    with store.engine.connect() as connection:
        asked = []
        sa.event.listen(connection, "before_cursor_execute", lambda *args: asked.append(args[2]))
        forecast._finished(connection, "gpu")
        forecast._running_s(connection, "gpu", Experience([]))
        forecast._queued_s(connection, "gpu", Experience([]))
        forecast.positions(connection, [view.id])
        forecast.positions(connection, [view.id, view.id])
        plans = [_query_plan(connection, text) for text in asked[:]]
    store.close()
    assert "jobs_queue (queue=? AND end_event=?" in plans[0]
    assert all("idx_workflow_status_in_flight" in plan for plan in (*plans[1:3], *plans[4:]))
    assert not any("SCAN jobs" in plan for plan in plans)


def _query_plan(connection, text):
    parameters = tuple("x" for _ in range(text.count("?")))
    rows = connection.exec_driver_sql("EXPLAIN QUERY PLAN " + text, parameters).all()
    return " | ".join(row.detail for row in rows)
