"""Submit, list, show, cancel and plan over HTTP."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.server.conftest import database_url  # noqa: F401 (on both databases)

MISSING = "job_00000000000000000000000000"


def test_submit_answers_202_with_the_job_and_its_location(client, spec):
    answer = client.post("/v1/jobs", json=spec)
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["status"], job["num_units"], job["labels"]) == ("queued", 3, {"project": "demo"})
    assert job["spec"]["optimizer"]["name"] == "adamw"  # defaults are filled in
    assert client.get(answer.headers["location"]).json() == job


def test_the_same_key_and_body_give_the_same_job_and_another_body_is_refused(client, spec):
    headers = {"Idempotency-Key": "key-1"}
    first = client.post("/v1/jobs", json=spec, headers=headers)
    reordered = dict(reversed(spec.items()))
    again = client.post("/v1/jobs", json=reordered, headers=headers)
    assert (first.status_code, again.status_code) == (202, 200)
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["location"] == first.headers["location"]
    other = client.post("/v1/jobs", json=spec | {"name": "other"}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_conflict")
    assert len(client.get("/v1/jobs").json()["data"]) == 1


def test_a_replay_is_answered_also_when_its_checkpoints_are_gone(client, spec, workspace):
    headers = {"Idempotency-Key": "key-1"}
    first = client.post("/v1/jobs", json=spec, headers=headers)
    (workspace / "runs").rename(workspace / "moved")
    again = client.post("/v1/jobs", json=spec, headers=headers)
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
    assert client.post("/v1/jobs", json=spec).json()["code"] == "checkpoint_error"


def test_concurrent_submits_with_one_key_make_one_job(client, spec):
    barrier = threading.Barrier(8)

    def submit(_):
        barrier.wait()
        return client.post("/v1/jobs", json=spec, headers={"Idempotency-Key": "same"})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(submit, range(8)))
    assert sorted(a.status_code for a in answers) == [200] * 7 + [202]
    assert len({a.json()["id"] for a in answers}) == 1
    assert len(client.get("/v1/jobs").json()["data"]) == 1


def test_without_a_key_every_submit_is_a_new_job(client, spec):
    ids = {client.post("/v1/jobs", json=spec).json()["id"] for _ in range(3)}
    assert len(ids) == 3


def test_pages_hold_every_older_job_once_while_new_ones_arrive(client, spec):
    old = [client.post("/v1/jobs", json=spec).json()["id"] for _ in range(7)]
    seen, after, pages = [], None, 0
    while True:
        params = {"limit": 3} | ({"after": after} if after else {})
        page = client.get("/v1/jobs", params=params).json()
        assert page["object"] == "list"
        seen += [job["id"] for job in page["data"]]
        pages += 1
        if not page["has_more"]:
            break
        after = seen[-1]
        client.post("/v1/jobs", json=spec)  # must not move what is still to come
    assert seen == old[::-1]
    assert pages == 3


def test_filters_by_status_kind_and_every_label(client, spec):
    a = client.post("/v1/jobs", json=spec | {"labels": {"run": "a", "x": "1=2"}}).json()["id"]
    b = client.post("/v1/jobs", json=spec | {"labels": {"run": "b", "x": "1=2"}}).json()["id"]
    client.post(f"/v1/jobs/{b}/cancel")

    def ids(query):
        return [job["id"] for job in client.get(f"/v1/jobs?{query}").json()["data"]]

    assert ids("label=run=a") == [a]
    assert ids("label=x=1=2") == [b, a]
    assert ids("label=x=1=2&label=run=b") == [b]
    assert ids("status=queued") == [a]
    assert ids("status=cancelled&kind=checkpoint_series") == [b]
    assert ids("label=run=c") == []


def test_cancel_ends_a_queued_job_once(client, submitted):
    first = client.post(f"/v1/jobs/{submitted}/cancel")
    assert (first.status_code, first.json()["status"]) == (200, "cancelled")
    assert client.post(f"/v1/jobs/{submitted}/cancel").json() == first.json()


def test_plan_counts_and_queues_nothing(client, spec):
    plan = client.post("/v1/jobs:plan", json=spec).json()
    assert [unit["checkpoint"]["step"] for unit in plan["units"]] == [100, 200, 300]
    assert plan["units"][0]["learning_rate"] == pytest.approx(0.01)
    assert plan["num_parameters"] == 4
    assert (plan["backend"], plan["num_ranks"]) == ("single", 1)
    sharded = client.post("/v1/jobs:plan", json={**spec, "parallel": {"ranks": 2}}).json()
    assert (sharded["backend"], sharded["num_ranks"]) == ("fsdp2", 2)
    assert sharded["memory_bytes"] == 2 * sharded["memory_bytes_per_rank"]
    assert client.get("/v1/jobs").json()["data"] == []


def test_a_series_can_be_listed_before_a_job_is_made(client, spec):
    listed = client.post("/v1/checkpoints", json=spec["checkpoints"] | {"every": 2}).json()
    assert [ref["step"] for ref in listed["data"]] == [100, 300]
    wrong = client.post("/v1/checkpoints", json={"source": "local", "pth": "x"}).json()
    assert {e["field"] for e in wrong["errors"]} == {"path", "pth"}
    assert any("did you mean 'path'" in e["message"] for e in wrong["errors"])


@pytest.mark.parametrize("path", ["", "/cancel", "/events", "/results", "/chart"])
@pytest.mark.parametrize("job_id", [MISSING, "nope", "%00", "a%2Fb", "%F0%9F%92%A9", "x" * 3000])
def test_an_unknown_job_is_404_everywhere(client, path, job_id):
    method = client.post if path == "/cancel" else client.get
    answer = method(f"/v1/jobs/{job_id}{path}")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_an_id_no_job_can_have_does_not_reach_the_database(client, store, monkeypatch):
    asked = []
    monkeypatch.setattr(store, "get_job", lambda job_id: asked.append(job_id))
    monkeypatch.setattr(store, "get_jobs_json", lambda job_ids: asked.extend(job_ids) or {})
    for path in ("", "/results"):  # Postgres refuses NUL in a text
        assert client.get(f"/v1/jobs/%00{path}").status_code == 404
        assert client.get(f"/v1/jobs/{MISSING}{path}").status_code == 404
    assert asked == [MISSING, MISSING]


def test_workers_health_and_metrics(client, spec, submitted):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/v1/workers").json() == {"object": "list", "data": []}
    metrics = client.get("/metrics").text
    assert 'probe_jobs{queue="gpu",status="queued"} 1.0' in metrics
    assert 'probe_jobs{queue="cpu",status="failed"} 0.0' in metrics
    assert "probe_workers_alive 0.0" in metrics
    assert 'probe_http_requests_total{method="POST",route="/v1/jobs",status="202"} 1.0' in metrics
    assert submitted not in metrics
