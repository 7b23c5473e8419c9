"""The lease of a worker's name, the fence before what it writes, and who counts as dead.

Time is the database's, so a test that needs a silent worker moves its row's last heartbeat back.
"""

import asyncio
import datetime as dt
import signal
import uuid

import pytest
import sqlalchemy as sa
from dbos import DBOS

from server import queue, tables
from server.errors import JobTakenError, WorkerNameTakenError, WorkerStuckError
from server.store import SqlStore
from server.tables import workers
from server.wire import JobError, WorkerView
from server.worker import heartbeat as heartbeat_module
from server.worker import main as main_module
from server.worker import orphans
from server.worker.heartbeat import Heartbeat, Steadiness
from server.worker.lease import Lease
from server.worker.stop_request import StopRequest

STALE_S = 60.0


def view_of(name, pid=1):
    now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    return WorkerView(
        name=name,
        hostname="host-a",
        pid=pid,
        queues=["gpu"],
        device="cpu",
        started_at=now,
        last_heartbeat=now,
        alive=True,
    )


@pytest.fixture
def make_lease(store):
    def make(name="w", instance=None):
        return Lease(store.engine, name, instance or str(uuid.uuid4()), STALE_S)

    return make


def fall_silent(store, name, seconds):
    with store.engine.begin() as connection:
        connection.execute(
            sa.update(workers)
            .where(workers.c.name == name)
            .values(last_heartbeat=tables.now_ms(store.engine) - int(seconds * 1000))
        )


def claim(store, job_id, executor, token):
    """What a worker's DBOS writes when it takes a job."""
    ws = queue.workflow_status_table(store.engine)
    with store.engine.begin() as connection:
        connection.execute(
            sa.update(ws)
            .where(ws.c.workflow_uuid == job_id)
            .values(status="PENDING", executor_id=executor, owner_xid=token)
        )


@pytest.fixture
def create(store, make_plan):
    def create(**plan):
        view, _ = store.create_job(plan=make_plan(**plan), idempotency_key=None, body_sha256="0")
        return view.id

    return create


# --- the lease


def test_a_held_name_is_refused_and_the_holder_named(make_lease):
    holder, other = make_lease(), make_lease()
    holder.take(view_of("w", pid=4711), [])
    with pytest.raises(WorkerNameTakenError, match=r"host-a \(process 4711, .*use --name"):
        other.take(view_of("w"), [])
    with pytest.raises(WorkerNameTakenError):
        other.renew(view_of("w"))
    holder.renew(view_of("w"))
    make_lease("another").take(view_of("another"), [])


@pytest.mark.parametrize(
    "how", ["stopped", "silent", "of another clock", "known to be gone", "from before leases"]
)
def test_a_name_is_free_once_its_holder_is_gone(store, make_lease, how):
    holder, other = make_lease(), make_lease()
    holder.take(view_of("w"), [])
    ended = []
    if how == "stopped":
        holder.release(view_of("w"))
    elif how == "silent":
        fall_silent(store, "w", STALE_S + 1)
    elif how == "of another clock":
        fall_silent(store, "w", -3600)
    elif how == "known to be gone":
        ended = ["something older", holder.instance]
    else:
        with store.engine.begin() as connection:
            connection.execute(sa.update(workers).values(instance=None))
    other.take(view_of("w", pid=2), ended)
    assert [(w.pid, w.alive) for w in store.list_workers()] == [(2, True)]
    # The one that was replaced can neither renew nor end what is no longer its own.
    with pytest.raises(WorkerNameTakenError, match="process 2"):
        holder.renew(view_of("w"))
    holder.release(view_of("w"))
    assert [w.alive for w in store.list_workers()] == [True]


def test_a_lease_lasts_as_long_as_it_says(store, make_lease):
    make_lease().take(view_of("w"), [])
    fall_silent(store, "w", STALE_S - 10)
    with pytest.raises(WorkerNameTakenError, match=r"heard of 5\d s ago"):
        make_lease().take(view_of("w"), [])


def test_a_removed_lease_is_not_renewed(store, make_lease):
    lease = make_lease()
    lease.take(view_of("w"), [])
    with store.engine.begin() as connection:
        connection.execute(sa.delete(workers))
    with pytest.raises(WorkerNameTakenError, match="has been removed"):
        lease.renew(view_of("w"))


def test_each_beat_tells_the_clock_and_which_jobs_are_ours(store, make_lease, create):
    mine, other, _ = create(), create(), create()
    claim(store, mine, "w", "t1")
    claim(store, other, "v", "t2")
    lease = make_lease()
    lease.take(view_of("w"), [])
    before, ours = lease.renew(view_of("w"))
    assert ours == {mine: "t1"}
    after, _ = lease.renew(view_of("w"))
    assert 0 <= after - before < 60_000
    store.cancel_job(mine)
    assert lease.renew(view_of("w"))[1] == {}


# --- the fence


def test_only_the_execution_that_has_the_job_writes_about_it(store, create, make_result):
    job_id = create(num_units=2)
    unit = store.get_plan(job_id).units[0]
    claim(store, job_id, "w", "old")
    store.mark_running(job_id, "w", "old")
    claim(store, job_id, "v", "new")  # taken over
    before = store.events_after(job_id, 0)
    error = JobError(code="c", message="m")
    for write in (
        lambda: store.mark_running(job_id, "w", "old"),
        lambda: store.record_unit(job_id, make_result(unit), "old"),
        lambda: store.append_event(job_id, "unit.progress", {}, "old"),
        lambda: store.record_error(job_id, error, "old"),
    ):
        with pytest.raises(JobTakenError, match=job_id):
            write()
    assert store.events_after(job_id, 0) == before
    assert store.unit_results(job_id) == []
    assert store.record_unit(job_id, make_result(unit, eta_c=0.25), "new")
    assert [r.measurements[0].eta_c for r in store.unit_results(job_id)] == [0.25]


def test_nothing_is_written_about_a_cancelled_job(store, create, make_result):
    job_id = create()
    claim(store, job_id, "w", "t")
    store.cancel_job(job_id)
    with pytest.raises(JobTakenError):
        store.record_unit(job_id, make_result(store.get_plan(job_id).units[0]), "t")
    assert store.unit_results(job_id) == []


@pytest.mark.postgres
def test_a_job_cannot_change_hands_between_the_fence_and_the_write(postgres_url, make_plan):
    """On Postgres, where transactions run side by side; SQLite lets one write at a time."""
    store = SqlStore(postgres_url)
    job_id = store.create_job(plan=make_plan(), idempotency_key=None, body_sha256="0")[0].id
    claim(store, job_id, "w", "old")
    ws = queue.workflow_status_table(store.engine)
    with store._writing(job_id, "old"), store.engine.connect() as other:
        other.execute(sa.text("SET lock_timeout = '100ms'"))
        with pytest.raises(sa.exc.OperationalError, match="lock timeout"):
            other.execute(sa.update(ws).where(ws.c.workflow_uuid == job_id).values(owner_xid="new"))
    store.close()


# --- who is dead


@pytest.fixture
def queued_again(monkeypatch):
    names = []
    monkeypatch.setattr(DBOS, "_recover_pending_workflows", lambda ids: names.extend(ids))
    return names


@pytest.mark.parametrize(
    ("state", "guess", "expected"),
    [
        ("alive", True, []),
        ("silent", True, ["v"]),
        ("silent", False, []),
        ("before the clock was set back", True, ["v"]),
        ("missing", True, ["v"]),
        ("missing", False, []),
        ("stopped", False, ["v"]),
    ],
)
def test_whose_jobs_are_taken(store, make_lease, create, queued_again, state, guess, expected):
    for executor in ("v", "v", "own"):
        claim(store, create(), executor, "t")
    create()  # queued: nobody's
    make_lease("own").take(view_of("own"), [])
    lease = make_lease("v")
    if state != "missing":
        lease.take(view_of("v"), [])
    if state == "silent":
        fall_silent(store, "v", STALE_S + 1)
    if state == "before the clock was set back":
        fall_silent(store, "v", -3600)
        assert not store.list_workers()[0].alive
    if state == "stopped":
        lease.release(view_of("v"))
    found = orphans.adopt_by_lease(store.engine, "own", worker_stale_s=STALE_S, guess=guess)
    assert found == queued_again == expected


def test_nobody_is_judged_by_one_that_is_silent_itself(store, make_lease, create, queued_again):
    """An outage that has just begun: our beat is still waiting, nothing has failed yet."""
    claim(store, create(), "v", "t")
    for name, silent_s in (("v", STALE_S + 1), ("own", STALE_S / 2 + 1)):
        make_lease(name).take(view_of(name), [])
        fall_silent(store, name, silent_s)
    assert orphans.adopt_by_lease(store.engine, "own", worker_stale_s=STALE_S, guess=True) == []
    fall_silent(store, "own", STALE_S / 4)
    orphans.adopt_by_lease(store.engine, "own", worker_stale_s=STALE_S, guess=True)
    assert queued_again == ["v"]


def test_after_an_outage_nobody_is_judged_for_the_length_of_a_lease():
    steadiness = Steadiness(60)
    for second in range(0, 61, 10):
        steadiness.succeeded(second, second)
        assert not steadiness.is_steady
    steadiness.succeeded(70, 70)
    assert steadiness.is_steady
    steadiness.failed()
    assert not steadiness.is_steady
    steadiness.succeeded(80, 80)
    steadiness.succeeded(140, 100)
    assert not steadiness.is_steady


@pytest.mark.parametrize(
    ("machine_s", "database_s"),
    [(101, 80), (80, 101), (80, 69)],
    ids=["stopped", "suspended with its clock", "the database's clock went back"],
)
def test_a_gap_between_beats_counts_as_an_outage(machine_s, database_s):
    steadiness = Steadiness(60)
    for second in range(0, 71, 10):
        steadiness.succeeded(second, second)
    assert steadiness.is_steady
    steadiness.succeeded(machine_s, database_s)
    assert not steadiness.is_steady


def test_an_ordinary_delay_is_no_gap():
    steadiness = Steadiness(60)
    for second in (0, 30, 60, 61):
        steadiness.succeeded(second, second)
    assert steadiness.is_steady


# --- the comparison at each beat


class FakeRunner:
    def __init__(self):
        self.running, self.active, self.left = {}, set(), {}

    def tokens(self):
        return dict(self.running)

    def active_ids(self):
        return self.active | set(self.running)

    def leave(self, tokens):
        self.left |= tokens


class FakeLease:
    def __init__(self):
        self.ours = {}

    def renew(self, view):
        return 0, dict(self.ours)


@pytest.fixture
def beating(monkeypatch):
    """A heartbeat beaten by hand, its runner and lease, what it called stuck, and its clock."""
    lease, runner, stuck, clock = FakeLease(), FakeRunner(), [], [0.0]
    monkeypatch.setattr(heartbeat_module.time, "monotonic", lambda: clock[0])
    heartbeat = Heartbeat(
        lease,
        runner,
        lambda: view_of("w"),
        heartbeat_s=10,
        worker_stale_s=STALE_S,
        on_lost=lambda error: None,
        on_stuck=stuck.append,
    )
    return heartbeat, runner, lease, stuck, clock


def test_what_is_no_longer_ours_is_given_up(beating):
    heartbeat, runner, lease, _, _ = beating
    runner.running = {"mine": "a", "taken": "b", "cancelled": "c", "back again": "old"}
    lease.ours = {"mine": "a", "back again": "new", "queued here": "d"}
    heartbeat.beat()
    assert runner.left == {"taken": "b", "cancelled": "c", "back again": "old"}


def test_a_job_that_is_ours_and_never_begins_is_stuck(beating):
    heartbeat, runner, lease, stuck, clock = beating
    lease.ours = {"runs": "a", "ends": "b", "lost": "c"}
    runner.running, runner.active = {"runs": "a"}, {"ends"}
    heartbeat.beat()
    clock[0] = 10.0
    heartbeat.beat()
    assert stuck == [["lost"]]


def test_a_job_that_is_about_to_begin_is_not_stuck(beating):
    heartbeat, runner, lease, stuck, clock = beating
    lease.ours = {"j": "a"}
    heartbeat.beat()
    clock[0] = heartbeat_module.STUCK_S - 1
    heartbeat.beat()
    runner.running = {"j": "a"}
    clock[0] += 10
    heartbeat.beat()
    runner.running = {}
    lease.ours = {"j": "another token"}
    clock[0] += 1
    heartbeat.beat()
    assert stuck == []


def test_a_worker_starts_itself_again_three_times_an_hour_at_most(monkeypatch):
    monkeypatch.setattr(main_module.time, "time", lambda: 10_000.0)
    first = main_module._counted("", ["job_a"])
    assert first == "1:10000"
    assert main_module._counted("2:7000", ["job_a"]) == "3:7000"
    with pytest.raises(WorkerStuckError, match=r"job_a, job_b.*3 starts within an hour"):
        main_module._counted("3:6500", ["job_a", "job_b"])
    assert main_module._counted("3:6300", ["job_a"]) == first  # long ago


def test_a_stop_can_be_asked_for_in_the_middle_of_waiting_for_it():
    """A thousand signals while the main thread waits, wakes and waits again."""
    request, num_handled = StopRequest(), 0

    def on_signal(number, frame):
        nonlocal num_handled
        num_handled += 1
        request.make()

    previous = signal.signal(signal.SIGALRM, on_signal)
    signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
    try:
        while num_handled < 1000:
            request.is_made = False
            request.wait(0.0001)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    request.make()
    assert request.wait(60)
    assert asyncio.run(request.made_within(60))
    assert not asyncio.run(StopRequest().made_within(0.01))
