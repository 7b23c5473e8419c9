"""The store's promises, on SQLite and Postgres; test_worker and test_kill have the worker's."""

import fcntl
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from dbos._sys_db import WorkflowStatusString

from server import migrations, queue, tables
from server import store as store_module
from server.errors import IdempotencyConflictError, StoreNotReadyError
from server.job_ids import new_job_id
from server.job_views import time_of
from server.store import SqlStore
from server.wire import JobError
from tests.server.conftest import dice_for_a_clock


@pytest.fixture
def create(store, make_plan):
    def create(*, key=None, body="0", **plan):
        return store.create_job(plan=make_plan(**plan), idempotency_key=key, body_sha256=body)

    return create


def set_dbos_status(store, job_id, status, **columns):
    """What a worker's DBOS would write."""
    workflows = queue.workflow_status_table(store.engine)
    with store.engine.begin() as connection:
        connection.execute(
            sa.update(workflows)
            .where(workflows.c.workflow_uuid == job_id)
            .values(status=status, **columns)
        )


def test_a_job_has_ended_when_its_last_event_says(store, create, monkeypatch):
    job_id = create()[0].id
    of_dice = store_module._count_event(dice_for_a_clock(store.engine))[1]
    monkeypatch.setattr(store, "_count_and_close", of_dice)
    store.cancel_job(job_id)
    last = store.events_after(job_id, 0)[-1]
    assert last.type == "job.cancelled"
    with store.engine.connect() as connection:
        ended_at = connection.scalar(sa.select(tables.jobs.c.ended_at))
    assert time_of(ended_at) == last.at


def test_ids_sort_in_the_order_they_were_made():
    ids = [new_job_id() for _ in range(2000)]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    assert {len(job_id) for job_id in ids} == {30}
    assert len({job_id[14:] for job_id in ids}) == len(ids)  # the random part


def test_a_new_job_is_queued_with_its_plan_and_first_event(store, create, make_plan):
    view, created = create(labels={"project": "demo"}, num_units=2)
    assert created
    assert view == store.get_job(view.id)
    assert (view.status, view.kind, view.labels) == (
        "queued",
        "checkpoint_series",
        {"project": "demo"},
    )
    assert (view.num_units, view.num_units_finished, view.expected_forward_passes) == (2, 0, 8)
    assert (view.started_at, view.finished_at, view.error) == (None, None, None)
    assert store.get_plan(view.id) == make_plan(labels={"project": "demo"}, num_units=2)
    assert [(e.id, e.type) for e in store.events_after(view.id, 0)] == [(1, "job.queued")]
    assert store.get_job("job_unknown") is store.get_plan("job_unknown") is None


@pytest.mark.parametrize(("device", "expected"), [("auto", "gpu"), ("cuda", "gpu"), ("cpu", "cpu")])
def test_the_device_asked_for_decides_the_queue(store, create, device, expected):
    view, _ = create(device=device)
    workflows = queue.workflow_status_table(store.engine)
    with store.engine.connect() as connection:
        row = connection.execute(sa.select(workflows)).one()
    assert (row.workflow_uuid, row.queue_name, row.status) == (view.id, expected, "ENQUEUED")


def test_one_key_is_one_job_also_when_asked_at_the_same_moment(store, create):
    barrier = threading.Barrier(8)

    def ask(_):
        barrier.wait()
        return create(key="k")

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert len({view.id for view, _ in answers}) == 1
    assert sum(created for _, created in answers) == 1
    assert len(store.list_jobs()[0]) == 1
    with pytest.raises(IdempotencyConflictError, match="another body"):
        create(key="k", body="1")
    assert create(key=None)[1]
    assert create(key=None)[1]


def test_pages_and_filters(store, create):
    ids = [create(labels={"n": str(n % 2), "all": "x"})[0].id for n in range(7)]
    newest_first = ids[::-1]
    first, more = store.list_jobs(limit=3)
    assert ([job.id for job in first], more) == (newest_first[:3], True)
    second, more = store.list_jobs(limit=4, after=first[-1].id)
    assert ([job.id for job in second], more) == (newest_first[3:], False)
    set_dbos_status(store, ids[0], "PENDING")
    store.cancel_job(ids[1])

    def listed(**filters):
        return [job.id for job in store.list_jobs(**filters)[0]]

    assert listed(status="running") == [ids[0]]
    assert listed(status="cancelled") == [ids[1]]
    assert listed(status="queued", labels={"n": "0"}) == [ids[6], ids[4], ids[2]]
    assert listed(labels={"n": "1", "all": "x"}) == [ids[5], ids[3], ids[1]]
    assert listed(labels={"n": "1", "all": "y"}) == []
    assert listed(kind="checkpoint_series") == newest_first
    assert listed(kind="mix_scan") == listed(status="no such status") == []


def test_a_unit_is_recorded_and_told_once(store, create, make_result):
    view, _ = create(num_units=3)
    units = store.get_plan(view.id).units
    barrier = threading.Barrier(6)

    def record(number):
        barrier.wait()
        return store.record_unit(view.id, make_result(units[1], num_forward_passes=number))

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(record, range(1, 7))) == 1
    store.record_unit(view.id, make_result(units[0], eta_c=None, num_forward_passes=10))
    results = store.unit_results(view.id)
    assert [result.unit.index for result in results] == [0, 1]
    view = store.get_job(view.id)
    assert (view.num_units_finished, view.num_units_without_answer) == (2, 1)
    assert view.num_forward_passes == 10 + results[1].num_forward_passes
    finished = [e for e in store.events_after(view.id, 0) if e.type == "unit.finished"]
    assert [event.data["index"] for event in finished] == [1, 0]
    assert finished[0].data["summaries"][0]["lambda_c_mean"] == 2 / 0.5


def test_event_ids_have_no_gaps_whoever_writes(store, create):
    view, _ = create()
    other = SqlStore(store.engine.url.render_as_string())

    def write(number):
        for _ in range(10):
            (store, other)[number % 2].append_event(view.id, "unit.progress", {})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    other.close()
    assert [e.id for e in store.events_after(view.id, 0)] == list(range(1, 82))
    assert [e.id for e in store.events_after(view.id, 40, limit=3)] == [41, 42, 43]


def test_notable_events_leave_progress_out(store, create):
    view, _ = create()
    for number in range(6):
        store.append_event(view.id, "unit.progress", {})
        store.append_event(view.id, "unit.started", {"index": number})
    store.append_event(view.id, "unit.progress", {})
    found, last = store.notable_events(view.id, 2)
    assert [(e.id, e.data) for e in found] == [(11, {"index": 4}), (13, {"index": 5})]
    assert last == 14


@pytest.mark.parametrize(
    ("dbos_status", "status", "code"),
    [
        ("SUCCESS", "succeeded", None),
        ("CANCELLED", "cancelled", None),
        ("ERROR", "failed", "internal_error"),
        ("MAX_RECOVERY_ATTEMPTS_EXCEEDED", "failed", "worker_crash_loop"),
    ],
)
def test_the_end_is_told_once_whoever_sees_it_first(store, create, dbos_status, status, code):
    view, _ = create()
    store.mark_running(view.id, "w")
    set_dbos_status(store, view.id, dbos_status, completed_at=2_000_000_000_000)
    with ThreadPoolExecutor(8) as pool:
        pages = list(pool.map(lambda _: store.events_after(view.id, 0), range(8)))
    assert all(page == pages[0] for page in pages)
    assert [e.type for e in pages[0]] == ["job.queued", "job.running", f"job.{status}"]
    assert pages[0][-1].data.get("code") == code
    ended = store.get_job(view.id)
    assert (ended.status, ended.error and ended.error.code) == (status, code)
    assert ended.finished_at >= ended.started_at
    assert store.append_event(view.id, "unit.progress", {}) is None
    assert store.cancel_job(view.id) == ended
    store.settle_all()
    assert len(store.events_after(view.id, 0)) == 3


def test_jobs_whose_row_dbos_no_longer_has_break_no_list(store, create):
    """Somebody else has removed it: what had ended stays so, the others cannot be told of."""
    ended, open_ = create()[0].id, create()[0].id
    store.cancel_job(ended)
    before = store.get_job(ended)
    workflows = queue.workflow_status_table(store.engine)
    with store.engine.begin() as connection:
        connection.execute(sa.delete(workflows))
    after = store.get_job(ended)
    assert after.status == "cancelled"
    assert after.model_copy(update={"finished_at": None}) == before.model_copy(
        update={"finished_at": None}
    )
    assert after.finished_at >= after.created_at
    lost = store.get_job(open_)
    assert (lost.status, lost.error.code, lost.finished_at) == ("failed", "job_lost", None)
    assert [view.id for view in store.list_jobs()[0]] == [open_, ended]
    assert len(json.loads(store.list_jobs_json())["data"]) == 2
    assert store.cancel_job(open_) == lost


def test_every_missing_end_is_found_by_the_sweep(store, create):
    ids = [create()[0].id for _ in range(3)]
    for job_id in ids[:2]:
        set_dbos_status(store, job_id, "SUCCESS")
    store.settle_all()
    with store.engine.connect() as connection:
        query = sa.select(tables.jobs.c.end_event).order_by(tables.jobs.c.id)
        assert connection.scalars(query).all() == ["job.succeeded", "job.succeeded", None]


def test_a_failure_shows_only_once_the_job_has_failed(store, create, make_result):
    view, _ = create()
    error = JobError(code="unit_crashed", message="why", unit_id="0000-step-0")
    store.record_error(view.id, error)
    set_dbos_status(store, view.id, "PENDING")
    assert store.get_job(view.id).error is None
    set_dbos_status(store, view.id, "ERROR")
    assert store.get_job(view.id).error == error
    # A unit finished after it shows that the failure was got over.
    store.record_unit(view.id, make_result(store.get_plan(view.id).units[0]))
    assert store.get_job(view.id).error.code == "internal_error"


def test_a_crash_loop_is_told_of_also_after_an_ordinary_failed_try(store, create):
    view, _ = create()
    store.record_error(view.id, JobError(code="unit_stalled", message="why", unit_id="0000-step-0"))
    set_dbos_status(store, view.id, "MAX_RECOVERY_ATTEMPTS_EXCEEDED")
    assert store.get_job(view.id).error.code == "worker_crash_loop"


def test_a_finished_unit_clears_the_count_towards_a_crash_loop(store, create, make_result):
    view, _ = create()
    set_dbos_status(store, view.id, "PENDING", recovery_attempts=9)
    store.record_unit(view.id, make_result(store.get_plan(view.id).units[0]))
    workflows = queue.workflow_status_table(store.engine)
    with store.engine.connect() as connection:
        assert connection.scalar(sa.select(workflows.c.recovery_attempts)) == 1


def open_at_once(url, number=6):
    with ThreadPoolExecutor(number) as pool:
        stores = list(pool.map(lambda _: SqlStore(url), range(number)))
    for store in stores:
        store.ready()
    return stores


@pytest.mark.postgres
def test_many_processes_may_open_a_new_postgres_database_at_once(postgres):
    name = postgres.new_database()
    stores = open_at_once(postgres.url(name))
    with stores[0].engine.connect() as connection:
        assert migrations.current_revision(connection) == migrations.newest_revision()
    for store in stores:
        store.close()
    postgres.drop_database(name)


def test_many_processes_may_open_a_new_database_at_once(tmp_path):
    stores = open_at_once(f"sqlite:///{tmp_path / 'new' / 'probe.db'}")
    with stores[0].engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        assert connection.connection.dbapi_connection.isolation_level == "IMMEDIATE"
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == queue.BUSY_TIMEOUT_MS
        assert migrations.current_revision(connection) == migrations.newest_revision()
    for store in stores:
        store.close()


def test_tables_are_made_by_one_process_at_a_time(tmp_path):
    opening = threading.Thread(target=lambda: SqlStore(f"sqlite:///{tmp_path / 'new.db'}").close())
    with (tmp_path / "new.db.migrate-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        opening.start()
        opening.join(0.3)
        assert opening.is_alive()
    opening.join(30)
    assert not opening.is_alive()


def test_a_database_that_another_release_changes_is_not_ready(store):
    store.ready()
    with store.engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0001'"))
    with pytest.raises(StoreNotReadyError, match=r"revision 0001, this program needs 0002"):
        store.ready()


def test_a_broken_database_is_not_ready(store):
    with store.engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE ended_views"))
        connection.execute(sa.text("DROP TABLE unit_results"))
        connection.execute(sa.text("DROP TABLE job_labels"))
        connection.execute(sa.text("DROP TABLE events"))
        connection.execute(sa.text("DROP TABLE webhook_deliveries"))
        connection.execute(sa.text("DROP TABLE jobs"))
    with pytest.raises(StoreNotReadyError):
        store.ready()


def test_the_columns_we_read_from_dbos_are_there_and_mean_what_we_think(store, create):
    """The contract with DBOS: fails when another release moves what the joins rely on."""
    inspector = sa.inspect(store.engine)
    ours = queue.workflow_status_table(store.engine)
    found = {c["name"] for c in inspector.get_columns("workflow_status", schema=ours.schema)}
    assert {column.name for column in ours.columns} <= found
    known = {"ENQUEUED", "DELAYED", "PENDING", "SUCCESS", "ERROR", "CANCELLED", queue.CRASH_LOOP}
    assert {status.value for status in WorkflowStatusString} == known
    assert {
        s
        for word in ("queued", "running", "succeeded", "failed", "cancelled")
        for s in queue.dbos_statuses(word)
    } == known
    view, _ = create(num_units=2)
    client = queue.make_client(store.engine)
    status = client.retrieve_workflow(view.id).get_status()
    assert (status.name, status.queue_name, status.app_version) == ("probe", "gpu", "1")
    assert list(status.input["args"]) == [view.id, ["0000-step-0", "0001-step-1"]]
    client.cancel_workflow(view.id)
    assert store.get_job(view.id).status == "cancelled"
    client.destroy()


def test_postgres_compiles_and_a_lost_connection_counts_as_one():
    engine = queue.create_engine("postgresql+psycopg://user@/nowhere?host=/no/such/socket")
    assert queue.workflow_status_table(engine).schema == "dbos"
    assert "clock_timestamp" in str(sa.select(tables.now_ms(engine)).compile(engine))
    with pytest.raises(sa.exc.OperationalError) as caught, engine.connect():
        pass
    assert caught.value.connection_invalidated
    engine.dispose()
