"""Queue, place and estimated start over HTTP and on the pages."""

import datetime as dt
import time

import pytest
import sqlalchemy as sa

from server import queue, tables
from server.tables import jobs, workers
from server.wire import WorkerView
from tests.server.conftest import database_url  # noqa: F401 (on both databases)


@pytest.fixture
def live_worker(store):
    now = dt.datetime.now(dt.UTC)
    view = WorkerView(
        name="box-0",
        hostname="h",
        pid=1,
        queues=["gpu", "cpu"],
        slots={"gpu": 1, "cpu": 3},
        device="cpu",
        started_at=now,
        last_heartbeat=now,
        alive=True,
    )
    with store.engine.begin() as connection:
        connection.execute(
            sa.insert(workers).values(
                name="box-0",
                last_heartbeat=tables.now_ms(store.engine),
                stopped=False,
                view=view.model_dump(mode="json"),
            )
        )


def submit(client, spec, **changes):
    return client.post("/v1/jobs", json=spec | changes).json()


def test_the_answer_tells_queue_priority_and_place_at_once(client, spec):
    first = submit(client, spec)
    assert (first["queue"], first["priority"], first["queue_position"]) == ("gpu", 100, 1)
    urgent = submit(client, spec, priority=1, time_limit_s=90)
    assert (urgent["priority"], urgent["queue_position"]) == (1, 1)
    assert urgent["time_limit_s"] == 90
    assert client.get(f"/v1/jobs/{first['id']}").json()["queue_position"] == 2
    listed = client.get("/v1/jobs").json()["data"]
    assert [job["queue_position"] for job in listed] == [1, 2]
    cancelled = client.post(f"/v1/jobs/{urgent['id']}/cancel").json()
    assert cancelled["queue_position"] is None
    assert client.get(f"/v1/jobs/{first['id']}").json()["queue_position"] == 1


def test_jobs_of_one_queue(client, spec):
    on_gpu = submit(client, spec)["id"]
    on_cpu = submit(client, spec, model={"device": "cpu"})["id"]

    def ids(query):
        return [job["id"] for job in client.get(f"/v1/jobs?{query}").json()["data"]]

    assert ids("queue=gpu") == [on_gpu]
    assert ids("queue=cpu&status=queued") == [on_cpu]
    assert ids("queue=cpu&status=running") == []
    assert client.get("/v1/jobs?queue=tpu").status_code == 422


def test_a_start_is_estimated_once_something_has_finished(
    client, store, spec, live_worker, end_job
):
    done = submit(client, spec)
    assert done["estimated_start"] is None
    store.mark_running(done["id"], "box-0")
    end_job(done["id"])
    store.settle(done["id"])
    with store.engine.begin() as connection:
        took = {"started_at": 1_000, "ended_at": 61_000}
        connection.execute(sa.update(jobs).where(jobs.c.id == done["id"]).values(**took))
    running = submit(client, spec)["id"]
    workflows = queue.workflow_status_table(store.engine)
    with store.engine.begin() as connection:
        own = workflows.c.workflow_uuid == running
        connection.execute(sa.update(workflows).where(own).values(status="PENDING"))
    store.mark_running(running, "box-0")
    queued = submit(client, spec)
    deadline = time.monotonic() + 30
    while store.get_job(queued["id"]).estimated_start is None:
        assert time.monotonic() < deadline  # an earlier estimate is good for a second
    shown = client.get(f"/v1/jobs/{queued['id']}").json()
    start = dt.datetime.fromisoformat(shown["estimated_start"])
    # One minute per job, and one has just begun.
    assert 20 < (start - dt.datetime.now(dt.UTC)).total_seconds() < 65
    page = client.get(f"/jobs/{queued['id']}").text
    assert f"Place 1 in queue gpu, starts about {start:%Y-%m-%d }" in page
    jobs_page = client.get("/").text
    assert ">#1</span>" in jobs_page
    assert "gpu, cpu &times;3" in jobs_page


def test_a_page_tells_limit_priority_and_who_submitted(client, store, spec):
    job_id = submit(client, spec, priority=200, time_limit_s=7200)["id"]
    with store.engine.begin() as connection:
        connection.execute(sa.update(jobs).values(submitted_by="<b>anna"))
    page = client.get(f"/jobs/{job_id}").text
    assert "gpu, priority 200" in page
    assert "7200 s" in page
    assert "&lt;b&gt;anna" in page
