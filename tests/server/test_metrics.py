"""What a scrape tells of the whole service, from its database."""

import re

import pytest
import sqlalchemy as sa
from prometheus_client import CollectorRegistry, generate_latest

from server import queue, tables
from server.metric_events import EventFollower
from server.store import SqlStore
from server.tables import events, jobs, workers
from server.wire import JobError
from tests.server.jobs.conftest import _plan as make_plan
from tests.server.jobs.conftest import make_result

SPEC = {"batches": {"sequence_length": 16, "batch_sequences": 4, "held_out_sequences": 8}}


@pytest.fixture
def store(database_url):
    store = SqlStore(database_url, worker_stale_s=60)
    yield store
    store.close()


class Scraper:
    def __init__(self, store):
        self.registry = CollectorRegistry()
        store.feed_metrics(self.registry)

    def __call__(self):
        text = generate_latest(self.registry).decode()
        return {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if not line.startswith("#")
        }


def submit(store, **given):
    plan = make_plan(**given)
    return store.create_job(plan=plan, idempotency_key=None, body_sha256="0")[0].id, plan


def end(store, job_id, status):
    workflows = queue.workflow_status_table(store.engine)
    with store.engine.begin() as connection:
        connection.execute(
            sa.update(workflows)
            .where(workflows.c.workflow_uuid == job_id)
            .values(status=status, completed_at=sa.literal_column("updated_at"))
        )
    store.settle(job_id)


def shift(store, table, column, job_id, by_ms):
    key = jobs.c.id if table is jobs else events.c.job_id
    with store.engine.begin() as connection:
        connection.execute(
            sa.update(table).where(key == job_id).values({column: table.c[column] + by_ms})
        )


def test_jobs_are_counted_by_state_and_queue_and_zeros_are_there(store):
    scrape = Scraper(store)
    assert scrape()['probe_jobs{queue="cpu",status="running"}'] == 0
    submit(store)
    submit(store, device="cpu")
    done = submit(store, device="cpu")[0]
    end(store, done, "SUCCESS")
    unsettled = submit(store)[0]
    with store.engine.begin() as connection:  # DBOS has ended it, nobody has looked yet
        workflows = queue.workflow_status_table(store.engine)
        connection.execute(
            sa.update(workflows)
            .where(workflows.c.workflow_uuid == unsettled)
            .values(status="ERROR", completed_at=1)
        )
    found = {name: value for name, value in scrape().items() if name.startswith("probe_jobs{")}
    assert {name: value for name, value in found.items() if value} == {
        'probe_jobs{queue="gpu",status="queued"}': 1,
        'probe_jobs{queue="cpu",status="queued"}': 1,
        'probe_jobs{queue="cpu",status="succeeded"}': 1,
        'probe_jobs{queue="gpu",status="failed"}': 1,
    }
    assert len(found) == 2 * 5


def test_a_unit_adds_its_seconds_passes_tokens_and_memory(store):
    scrape = Scraper(store)
    job_id, plan = submit(store)
    for unit, seconds in zip(plan.units[:2], (0.7, 90.0), strict=True):
        result = make_result(unit, num_forward_passes=6)
        changed = {"duration_s": seconds, "memory_bytes": 10**12 + unit.index, "spec": SPEC}
        store.record_unit(job_id, result.model_copy(update=changed))
        store.record_unit(job_id, result.model_copy(update=changed))  # recorded once
    kind = 'kind="checkpoint_series"'
    for _ in range(2):  # a second scrape counts nothing twice
        found = scrape()
        assert found[f"probe_unit_seconds_count{{{kind}}}"] == 2
        assert found[f"probe_unit_seconds_sum{{{kind}}}"] == pytest.approx(90.7)
        assert found[f'probe_unit_seconds_bucket{{{kind},le="1.0"}}'] == 1
        assert found[f"probe_forward_passes_total{{{kind}}}"] == 12
        assert found[f"probe_tokens_total{{{kind}}}"] == 12 * 8 * 16
        assert found[f"probe_unit_memory_bytes{{{kind}}}"] == 10**12 + 1


def test_the_wait_of_a_job_is_that_of_its_first_start(store):
    scrape = Scraper(store)
    job_id, _ = submit(store, device="cpu")
    shift(store, jobs, "created_at", job_id, -20_000)
    store.mark_running(job_id, "w")
    store.mark_running(job_id, "w")
    found = scrape()
    assert found['probe_queue_wait_seconds_count{queue="cpu"}'] == 1
    assert 20 <= found['probe_queue_wait_seconds_sum{queue="cpu"}'] < 80
    assert found['probe_queue_wait_seconds_bucket{le="10.0",queue="cpu"}'] == 0


def test_failures_are_counted_by_code_and_ends_by_state(store):
    scrape = Scraper(store)
    failed, cancelled = submit(store)[0], submit(store)[0]
    store.append_event(failed, "unit.retrying", {"code": "unit_stalled", "message": "?"})
    store.record_error(failed, JobError(code="unit_crashed", message="?"))
    end(store, failed, "ERROR")
    end(store, cancelled, "CANCELLED")
    found = scrape()
    assert found['probe_unit_retries_total{code="unit_stalled"}'] == 1
    assert found['probe_job_failures_total{code="unit_crashed"}'] == 1
    assert found['probe_jobs_ended_total{kind="checkpoint_series",status="failed"}'] == 1
    assert found['probe_jobs_ended_total{kind="checkpoint_series",status="cancelled"}'] == 1


def test_counting_begins_with_the_server(store):
    job_id, plan = submit(store)
    store.record_unit(job_id, make_result(plan.units[0]))
    shift(store, events, "at", job_id, -5)
    assert not any("probe_unit_seconds_count" in name for name in Scraper(store)())


def test_an_event_that_becomes_visible_late_is_counted_once(store):
    follower = EventFollower(store.engine)
    early, late = submit(store)[0], submit(store)[0]
    store.mark_running(late, "w")
    assert len(follower.news()) == 1
    store.mark_running(early, "w")
    with store.engine.begin() as connection:  # its time is before the one that has been read
        connection.execute(
            sa.update(events)
            .where(events.c.job_id == early, events.c.type == "job.running")
            .values(at=sa.select(sa.func.min(events.c.at)).scalar_subquery())
        )
    assert len(follower.news()) == 1
    assert follower.news() == []


def test_what_was_seen_is_forgotten_once_it_cannot_be_read_again(store):
    follower = EventFollower(store.engine)
    job_id = submit(store)[0]
    store.mark_running(job_id, "w")
    assert len(follower.news()) == 1
    follower._since += 10**6  # the clock goes on
    assert follower.news() == []
    assert follower._seen == {}


def test_imported_jobs_happened_elsewhere(store):
    follower = EventFollower(store.engine)
    job_id, plan = submit(store)
    store.record_unit(job_id, make_result(plan.units[0]))
    with store.engine.begin() as connection:
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(imported_at=1))
    assert follower.news() == []


def add_worker(store, name, age_s, *, stopped=False, **view):
    now = tables.now_ms(store.engine) - int(age_s * 1000)
    row = {"name": name, "last_heartbeat": now, "stopped": stopped, "view": view}
    with store.engine.begin() as connection:
        connection.execute(sa.insert(workers).values(**row))


def test_workers_tell_their_heartbeat_jobs_and_gpus(store):
    gpu = {
        "index": 1,
        "name": "H100",
        "memory_used_bytes": 3 * 10**10,
        "memory_total_bytes": 8 * 10**10,
    }
    add_worker(store, "live", 2, current_job_ids=["a", "b"], gpus=[gpu])
    add_worker(store, "dead", 300, current_job_ids=["c"])
    add_worker(store, "gone", 300, stopped=True)
    found = Scraper(store)()
    assert found["probe_workers_alive"] == 1
    assert 2 <= found['probe_worker_heartbeat_age_seconds{worker="live"}'] < 60
    assert 300 <= found['probe_worker_heartbeat_age_seconds{worker="dead"}'] < 360
    assert found['probe_worker_jobs{worker="live"}'] == 2
    assert found['probe_worker_jobs{worker="dead"}'] == 0
    assert not any('worker="gone"' in name for name in found)
    labels = 'gpu="1",name="H100",worker="live"'
    assert found[f"probe_gpu_memory_used_bytes{{{labels}}}"] == 3e10
    assert found[f"probe_gpu_memory_total_bytes{{{labels}}}"] == 8e10


def test_no_series_is_named_after_a_job(store):
    job_id, plan = submit(store)
    scrape = Scraper(store)
    store.mark_running(job_id, "w")
    store.record_unit(job_id, make_result(plan.units[0]))
    assert not any(re.search(r"job_[0-9a-z]{20}", name) for name in scrape())
