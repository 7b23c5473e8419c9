"""Every error is problem+json with its stable code, and none is ours to blame."""

import json

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.exc import InternalError, OperationalError

from server.api.app import create_app
from server.errors import StoreNotReadyError
from server.settings import Settings

JSON = {"Content-Type": "application/json"}


def assert_problem(answer, status, code):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert (problem["status"], problem["code"]) == (status, code)
    assert set(problem) == {"type", "title", "status", "detail", "code", "errors"}
    assert problem["title"]
    assert problem["detail"]
    return problem


def test_nothing_there(client):
    assert_problem(client.get("/v1/nothing"), 404, "not_found")


def test_wrong_method_names_the_right_ones(client):
    answer = client.delete("/v1/jobs")
    assert_problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"]


@pytest.mark.parametrize("path", ["results", "chart"])
def test_not_acceptable(client, submitted, path):
    answer = client.get(f"/v1/jobs/{submitted}/{path}", headers={"Accept": "video/mp4"})
    assert "Accept" in assert_problem(answer, 406, "not_acceptable")["detail"]


@pytest.mark.parametrize("declared", [True, False])
def test_body_too_large_with_and_without_a_declared_length(client, declared):
    body = b" " * (Settings().max_body_bytes + 1)
    content = body if declared else iter([body[:1000], body[1000:]])
    answer = client.post("/v1/jobs", content=content, headers=JSON)
    assert_problem(answer, 413, "body_too_large")


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_unsupported_media_type(client, media_type):
    answer = client.post("/v1/jobs", content=b"{}", headers={"Content-Type": media_type})
    assert_problem(answer, 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "not utf-8", "nan", "deep", "a long number"],
)
def test_not_json(client, body):
    assert_problem(client.post("/v1/jobs:plan", content=body, headers=JSON), 400, "invalid_json")


@pytest.mark.parametrize("body", ["null", "[]", "1", '"text"', "{}", '{"kind": null}'])
def test_json_but_no_job(client, body):
    answer = client.post("/v1/jobs", content=body, headers=JSON)
    assert assert_problem(answer, 422, "config_error")["errors"]


def test_a_wrong_spec_names_every_field_and_the_nearest_key(client, spec):
    spec["batches"]["sequence_lenght"] = spec["batches"].pop("sequence_length")
    spec["measurement"]["repeats"] = 0
    errors = assert_problem(client.post("/v1/jobs", json=spec), 422, "config_error")["errors"]
    messages = {error["field"]: error["message"] for error in errors}
    assert "did you mean 'sequence_length'" in messages["batches.sequence_lenght"]
    assert "batches.sequence_length" in messages
    assert "measurement.repeats" in messages


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"name": "a\u0000b"}, "name"),
        ({"name": "a\ud800b"}, "name"),
        ({"labels": {"a\u0000": "b"}}, "labels.'a\\x00'"),
        ({"schedule": {"warmup_steps": 2**63}}, "schedule.warmup_steps"),
        ({"schedule": {"total_steps": -(10**300)}}, "schedule.total_steps"),
    ],
)
def test_values_that_no_database_holds_are_refused_by_field(client, spec, value, field):
    answer = client.post("/v1/jobs", content=json.dumps(spec | value), headers=JSON)
    problem = assert_problem(answer, 422, "config_error")
    assert [error["field"] for error in problem["errors"]] == [field]


def test_a_float_beyond_the_range_is_refused(client, spec):
    body = json.dumps(spec).replace('"repeats": 2', '"repeats": 2, "eta_max": 1e999')
    answer = client.post("/v1/jobs", content=body, headers=JSON)
    fields = [e["field"] for e in assert_problem(answer, 422, "config_error")["errors"]]
    assert fields == ["measurement.eta_max"]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "query.limit"),
        ("limit=x", "query.limit"),
        ("status=done", "query.status"),
        ("label=nolabel", "query.label.0"),
        ("label=a=%00", "query.label.0"),
        ("after=%00", "query.after"),
        ("lable=a=b", "query.lable"),
    ],
)
def test_a_wrong_query_names_the_parameter(client, query, field):
    problem = assert_problem(client.get(f"/v1/jobs?{query}"), 422, "validation_error")
    assert [error["field"] for error in problem["errors"]] == [field]


@pytest.mark.parametrize("value", ["-1", "x", "9" * 40])
def test_a_wrong_last_event_id(client, submitted, value):
    answer = client.get(f"/v1/jobs/{submitted}/events", headers={"Last-Event-ID": value})
    assert_problem(answer, 422, "validation_error")


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "\u00e9"])
def test_a_wrong_idempotency_key(client, spec, key):
    headers = {"Idempotency-Key": key.encode("latin-1")}
    assert_problem(client.post("/v1/jobs", json=spec, headers=headers), 422, "validation_error")


def test_checkpoints_that_are_not_there(client, spec, workspace):
    spec["checkpoints"]["path"] = str(workspace / "nowhere" / "*")
    problem = assert_problem(client.post("/v1/jobs", json=spec), 422, "checkpoint_error")
    assert "nowhere" in problem["detail"]


@pytest.mark.parametrize("pattern", ["(", "(a)(b)", "no group"])
def test_a_step_pattern_that_is_no_regex_with_a_group(client, spec, pattern):
    spec["checkpoints"]["step_pattern"] = pattern
    assert_problem(client.post("/v1/jobs:plan", json=spec), 422, "config_error")


def test_a_chart_before_the_first_result(client, submitted):
    answer = client.get(f"/v1/jobs/{submitted}/chart")
    assert_problem(answer, 409, "no_results")


def test_secrets_stay_in_the_log(settings, store, monkeypatch, caplog):
    def fail(*_args, **_kwargs):
        raise RuntimeError("password=hunter2")

    monkeypatch.setattr(store, "list_jobs_json", fail)
    client = TestClient(
        create_app(settings, store), "http://127.0.0.1", raise_server_exceptions=False
    )
    answer = client.get("/v1/jobs")
    assert_problem(answer, 500, "internal_error")
    assert "hunter2" not in answer.text
    assert "hunter2" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        StoreNotReadyError("postgresql://me:hunter2@db"),
        OperationalError("select 1", {}, Exception("hunter2")),
        # of a session that Postgres ended, idle in a transaction for too long
        InternalError("select 1", {}, Exception("hunter2"), connection_invalidated=True),
    ],
)
def test_a_database_that_is_away_is_503_without_its_address(client, store, monkeypatch, error):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(store, "ready", fail)
    monkeypatch.setattr(store, "get_jobs_json", fail)
    for path in ("/readyz", "/v1/jobs/job_1"):
        answer = client.get(path)
        assert_problem(answer, 503, "store_not_ready")
        assert answer.headers["retry-after"]
        assert "hunter2" not in answer.text
    assert client.get("/healthz").status_code == 200


def test_another_error_of_the_database_is_none_to_repeat(settings, store, monkeypatch):
    def fail(*_args, **_kwargs):
        raise InternalError("select 1", {}, Exception("hunter2"))

    monkeypatch.setattr(store, "list_jobs_json", fail)
    app = create_app(settings, store)
    client = TestClient(app, "http://127.0.0.1", raise_server_exceptions=False)
    answer = client.get("/v1/jobs")
    assert_problem(answer, 500, "internal_error")
    assert "hunter2" not in answer.text


def test_presets_are_for_files_and_refused_over_http(client, spec):
    answer = client.post("/v1/jobs", json={**spec, "presets": {"quick": {}}})
    assert_problem(answer, 422, "config_error")
    (problem,) = answer.json()["errors"]
    assert problem["field"] == "presets"
    assert "for job files" in problem["message"]
