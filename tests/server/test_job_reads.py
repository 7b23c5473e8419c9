"""Pages of jobs: every filter gives what going through all jobs would, in one order, by indices."""

import hashlib
import json
import random

import pytest
import sqlalchemy as sa

from server import job_reads, queue
from server.ended_views import VIEW_VERSION, EndedViews
from server.event_reads import EventReads
from server.store import SqlStore
from server.tables import ended_views, jobs
from server.wire import JobError, JobList, JobView
from tests.server.jobs.conftest import _plan as make_plan
from tests.server.jobs.conftest import make_result

ENDS = {"succeeded": "SUCCESS", "failed": "ERROR", "cancelled": "CANCELLED", "running": "PENDING"}


@pytest.fixture
def store(database_url):
    store = SqlStore(database_url, worker_stale_s=60)
    yield store
    store.close()


def set_status(store, job_id, dbos_status, *, settle=True):
    workflows = queue.workflow_status_table(store.engine)
    done = sa.null() if dbos_status == "PENDING" else sa.literal_column("updated_at")
    with store.engine.begin() as connection:
        connection.execute(
            sa.update(workflows)
            .where(workflows.c.workflow_uuid == job_id)
            .values(status=dbos_status, completed_at=done)
        )
    if settle:
        store.settle(job_id)


def add(store, **given):
    plan = make_plan(**given)
    return store.create_job(plan=plan, idempotency_key=None, body_sha256="0")[0].id, plan


@pytest.fixture
def many(store):
    """Forty jobs of every state, device and label; the newest first."""
    draw = random.Random(3)
    for number in range(40):
        labels = {"team": draw.choice("ab"), "n": str(number % 7)}
        job_id, plan = add(store, labels=labels, device=draw.choice(["auto", "cpu"]), num_units=2)
        status = draw.choice(["queued", *ENDS])
        if draw.random() < 0.5:
            eta_c = draw.choice([0.5, None])
            store.record_unit(job_id, make_result(plan.units[0], eta_c=eta_c))
        if status == "failed":
            store.record_error(job_id, JobError(code="unit_crashed", message="why", unit_id="u"))
        if status != "queued":  # some have ended and nobody has looked
            set_status(store, job_id, ENDS[status], settle=draw.random() < 0.8)
    found, has_more = store.list_jobs(limit=200)
    assert (len(found), has_more) == (40, False)
    assert [view.id for view in found] == sorted((view.id for view in found), reverse=True)
    return found


FILTERS = [
    *({"status": status} for status in ("queued", *ENDS)),
    {"queue": "cpu"},
    {"queue": "gpu", "status": "failed"},
    {"labels": {"team": "a"}},
    {"labels": {"team": "a", "n": "3"}},
    {"labels": {"team": "b"}, "status": "succeeded", "queue": "cpu"},
    {"labels": {"team": "nobody"}},
    {"kind": "checkpoint_series", "status": "running"},
    {"kind": "mix_scan"},
    {"status": "no word of ours"},
    {"status": None, "kind": None, "queue": None, "labels": None},
]


def passes(view, filters):
    labels = filters.get("labels") or {}
    plain = {name: value for name, value in filters.items() if name != "labels" and value}
    return labels.items() <= view.labels.items() and all(
        getattr(view, name) == value for name, value in plain.items()
    )


def test_every_filter_and_page_gives_what_going_through_all_jobs_would(store, many):
    for filters in FILTERS:
        expected = [view for view in many if passes(view, filters)]
        for limit in (5, 50):
            after, seen = None, []
            while True:
                page, has_more = store.list_jobs(after=after, limit=limit, **filters)
                as_json = store.list_jobs_json(after=after, limit=limit, **filters)
                expected_json = JobList(data=page, has_more=has_more)
                assert JobList.model_validate_json(as_json) == expected_json
                seen += page
                assert has_more == (len(seen) < len(expected)), filters
                if not has_more:
                    break
                after = page[-1].id
            assert seen == expected, filters


def test_jobs_as_json_are_their_views_with_the_same_members(store, many):
    texts = store.get_jobs_json([*(view.id for view in many), "job_none"])
    assert set(texts) == {view.id for view in many}
    for view in many:
        assert JobView.model_validate_json(texts[view.id]) == view == store.get_job(view.id)
        assert set(json.loads(texts[view.id])) == set(json.loads(view.model_dump_json()))
    assert store.get_jobs_json([]) == {}


def rows_of(store):
    with store.engine.connect() as connection:
        return {row.job_id: row for row in connection.execute(sa.select(ended_views))}


def test_the_closing_event_brings_the_view_that_is_sent_from_then_on(store):
    job_id, plan = add(store)
    store.record_unit(job_id, make_result(plan.units[0]))
    assert rows_of(store) == {}
    set_status(store, job_id, "CANCELLED", settle=False)
    unsettled = store.get_job(job_id)
    store.settle(job_id)
    (row,) = rows_of(store).values()
    view = JobView.model_validate_json(row.body)
    assert view == store.get_job(job_id)
    assert (view.status, view.num_units_finished) == ("cancelled", 1)
    assert view == unsettled.model_copy(update={"finished_at": view.finished_at})
    # What is sent is this row, not the columns again.
    with store.engine.begin() as connection:
        changed = row.body.replace('"a series"', '"as it was sent"')
        connection.execute(sa.update(ended_views).values(body=changed))
    assert b"as it was sent" in store.get_jobs_json([job_id])[job_id]
    assert b"as it was sent" in store.list_jobs_json()
    with store.engine.begin() as connection:
        connection.execute(sa.delete(jobs))
    assert rows_of(store) == {}
    assert store.get_jobs_json([job_id]) == {}
    assert json.loads(store.list_jobs_json()) == {"object": "list", "data": [], "has_more": False}


@pytest.mark.parametrize("changed", ["none", "older", "newer"])
def test_a_view_of_another_version_or_none_is_made_from_the_columns(store, many, changed):
    expected = JobList(data=many, has_more=False)
    assert len(rows_of(store)) > 5
    with store.engine.begin() as connection:
        if changed == "none":  # as after an upgrade from the first release
            connection.execute(sa.delete(ended_views))
        else:
            version = VIEW_VERSION + (1 if changed == "newer" else -1)
            connection.execute(sa.update(ended_views).values(version=version, body="?"))
    assert JobList.model_validate_json(store.list_jobs_json(limit=200)) == expected
    texts = store.get_jobs_json([view.id for view in many])
    assert [JobView.model_validate_json(texts[view.id]) for view in many] == many


@pytest.mark.parametrize("changed", ["none", "older"])
def test_missing_and_older_views_are_written_again_the_newest_first(store, many, changed):
    before = rows_of(store)
    ended = sorted(before)
    with store.engine.begin() as connection:
        if changed == "none":
            connection.execute(sa.delete(ended_views))
        else:
            connection.execute(sa.update(ended_views).values(version=VIEW_VERSION - 1, body="?"))
    last = store.fill_ended_views(None, 4)
    assert last == ended[-4]
    current = [k for k, row in rows_of(store).items() if row.version == VIEW_VERSION]
    assert sorted(current) == ended[-4:]
    while last is not None:
        last = store.fill_ended_views(last, 4)
    assert rows_of(store) == before
    assert store.fill_ended_views(None, 4) is None


def test_a_job_that_cannot_be_shown_keeps_no_other_from_its_view(store, many, caplog):
    before = rows_of(store)
    newest = max(before)
    workflows = queue.workflow_status_table(store.engine)
    with store.engine.begin() as connection:
        connection.execute(sa.delete(ended_views))
        of_job = workflows.c.workflow_uuid == newest
        connection.execute(sa.update(workflows).where(of_job).values(status="A_LATER_WORD"))
    assert store.fill_ended_views(None, 100) is not None
    assert newest in caplog.text
    assert rows_of(store) == {job_id: row for job_id, row in before.items() if job_id != newest}


def test_a_view_that_is_there_already_is_written_over(store):
    """Jobs removed with SQLite's shell leave theirs, and may be imported again."""
    job_id, _ = add(store)
    set_status(store, job_id, "SUCCESS")
    with store.engine.begin() as connection:
        connection.execute(sa.update(jobs).values(imported_at=5))
        EndedViews(store.engine).write(connection, job_id)
        EndedViews(store.engine).write(connection, "job_none")
    assert list(rows_of(store)) == [job_id]
    assert store.get_job(job_id).imported_at is not None


def test_the_version_of_views_is_raised_with_their_schema():
    """Views in the database are sent as they are: of another schema they must not be current."""
    text = json.dumps(JobView.model_json_schema(), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    assert (VIEW_VERSION, digest) == (1, "61fe760d7886"), (
        "what a JobView says has changed: raise server.ended_views.VIEW_VERSION (since the last "
        "release: leave it), and put the new pair here"
    )


def test_sums_of_units_stand_in_the_row_of_an_ended_job_and_only_there(store):
    live, live_plan = add(store)
    done, plan = add(store)
    for job_id, made in ((live, live_plan), (done, plan)):
        store.record_unit(job_id, make_result(made.units[0], num_forward_passes=7))
        store.record_unit(job_id, make_result(made.units[1], eta_c=None))
    set_status(store, done, "SUCCESS")
    with store.engine.connect() as connection:
        columns = jobs.c.num_finished, jobs.c.num_without_answer, jobs.c.num_forward_passes
        rows = dict(
            (row[0], tuple(row[1:])) for row in connection.execute(sa.select(jobs.c.id, *columns))
        )
    assert rows == {live: (None, None, None), done: (2, 1, 11)}
    for job_id in (live, done):
        view = store.get_job(job_id)
        assert (view.num_units_finished, view.num_units_without_answer) == (2, 1)
        assert view.num_forward_passes == 11


@pytest.mark.parametrize("filters", FILTERS[:-2])
def test_a_page_reads_an_index_and_sorts_nothing_that_grows(tmp_path, filters):
    store = SqlStore(f"sqlite:///{tmp_path / 'probe.db'}")
    reads = store._reads
    given = {"limit", "after"} | {k for k in ("kind", "queue") if filters.get(k)}
    labels = filters.get("labels") or {}
    names = {"limit": 51, "after": "job_x", "kind": "k", "queue": "cpu"}
    names |= {f"{word}{n}": "x" for n in range(len(labels)) for word in ("key", "value")}
    shape = (filters.get("status"), frozenset(given), len(labels))
    with store.engine.connect() as connection:
        parts = [reads._part(end, *shape) for end in job_reads._ends(shape[0], "queue" in given)]
        for part in parts:
            compiled = part.params(**names).compile(
                store.engine, compile_kwargs={"literal_binds": True}
            )
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {compiled}").all()
            steps = [row[3] for row in plan]
            assert not any("TEMP B-TREE" in step for step in steps), steps
            assert not any(step.startswith("SCAN jobs") for step in steps), steps
    store.close()


def test_news_of_a_job_that_is_not_there_is_left_out(store):
    job_id, _ = add(store)
    reads = EventReads(store.engine, store.settle)
    found = reads.news({job_id: 0, "job_none": 0})
    assert list(found) == [job_id]
    newest, events = found[job_id]
    assert (newest, [event.type for event in events]) == (1, ["job.queued"])
    assert reads.news({job_id: None}) == reads.news({job_id: 0})  # of one event, the newest
    assert reads.news({job_id: 1}) == {job_id: (1, [])}
    assert reads.news({}) == {}
