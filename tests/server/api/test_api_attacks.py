"""Attacks that once got through, each kept out: what a table of single requests does not show."""

import json
import time
from itertools import islice
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from clients.http import ProbeClient
from clients.transfer import ExportError, export_job
from probe.spec_load import SpecError, parse_spec
from server.api import guard
from server.api.app import create_app
from server.api.bodies import parse_json
from server.keys import KeyTable
from server.settings import Settings
from server.store import SqlStore
from tests.server.conftest import database_url as database_url  # both kinds of database

LOOPBACK = "http://127.0.0.1"
TAR = {"Content-Type": "application/x-tar"}
# What a log or a terminal takes for the end of a line, and a regular expression's `$` perhaps.
LINE_BREAKS = ("%0A", "%0D", "%0D%0A", "%0B", "%0C", "%1B", "%C2%85", "%E2%80%A8", "%00", "%7F")


def client_of(store: SqlStore, **settings: Any) -> TestClient:
    app = create_app(Settings(**settings), store)
    return TestClient(app, LOOPBACK, raise_server_exceptions=False, follow_redirects=False)


def bearer(store: SqlStore, scope: Any) -> dict[str, str]:
    _, key = KeyTable(store.engine).create(f"{scope} key", scope)
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("end", LINE_BREAKS)
def test_no_path_with_a_line_break_is_a_route(store, end):
    """A route's `$` matches before a final line feed, so `jobs:import%0A` was a route, and not
    the path that asks for scope admin."""
    headers = bearer(store, "submit")
    client = client_of(store)
    answer = client.post(f"/v1/jobs:import{end}", headers=headers | TAR, content=b"")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert client.post("/v1/jobs:import", headers=headers | TAR, content=b"").status_code == 403
    # And `events%0A` was a stream that nothing counted, `healthz%0A` asked nobody who he is.
    for path in (f"/v1/jobs/none/events{end}", f"/healthz{end}", f"/static/app.js{end}"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
        assert answer.json()["detail"].isprintable()


def test_more_labels_than_a_job_has_are_refused(client):
    """Each is a join: SQLite takes 63, Postgres plans ever longer."""
    labels = [f"label=key{number}=x" for number in range(33)]
    assert client.get("/v1/jobs?" + "&".join(labels[:32])).status_code == 200
    answer = client.get("/v1/jobs?" + "&".join(labels))
    assert (answer.status_code, answer.json()["code"]) == (422, "validation_error")


def seconds(body: bytes) -> float:
    begin = time.thread_time()  # not what others take of the machine
    parse_json(body)
    return time.thread_time() - begin


def test_a_long_key_costs_nothing_for_each_value_within():
    """It was copied for each of them: 10 s for a body of a megabyte, in the event loop."""
    values = [0] * 200_000
    short, long = (json.dumps({"k" * n: values}).encode() for n in (1, 400_000))
    assert seconds(long) < 5 * seconds(short) + 0.1


def test_no_more_problems_of_a_spec_are_explained_than_anybody_reads(series_spec):
    """Each takes a quarter of a millisecond: 400,000 of them were a megabyte, and 100 s."""
    series_spec["batches"]["sources"] = [1] * 1000
    with pytest.raises(SpecError) as caught:
        parse_spec(series_spec)
    assert len(caught.value.problems) == 100


@pytest.mark.parametrize("roots", [True, False])
def test_a_pattern_reads_no_tree_again_and_again(store, spec, workspace, roots):
    """`**` in a row read the tree once for each way to share its depth among them: hours, in one
    of the server's threads."""
    client = client_of(store, roots=[workspace] if roots else [])
    many = f"{workspace}/" + "**/" * 300
    refused = client.post("/v1/checkpoints", json={"source": "local", "path": many + "step-*"})
    assert (refused.status_code, refused.json()["code"]) == (422, "path_not_allowed")
    source = spec["batches"]["sources"][0]
    source["paths"] = [many + "text.jsonl"]
    refused = client.post("/v1/jobs:plan", json=spec)
    assert (refused.status_code, refused.json()["code"]) == (422, "path_not_allowed")
    source["paths"] = [f"{workspace}/**/text.jsonl"]
    assert client.post("/v1/jobs:plan", json=spec).status_code == 200


@pytest.fixture
def keys(store: SqlStore) -> dict[str, str]:
    """Made before the app, so that it asks for them from the first request on."""
    table = KeyTable(store.engine)
    return {name: table.create(name, "submit")[1] for name in ("alice", "bob")}


def test_a_stream_ends_with_the_key_it_was_opened_with(keys, served, store, spec, monkeypatch):
    """It went on for as long as the job, to whoever had the key."""
    monkeypatch.setattr(guard, "_RECHECK_S", 0.05)
    alice, bob = ({"Authorization": f"Bearer {key}"} for key in keys.values())
    job_id = httpx.post(f"{served}/v1/jobs", json=spec, headers=alice, timeout=30).json()["id"]
    url = f"{served}/v1/jobs/{job_id}/events"
    with (
        httpx.stream("GET", url, headers=alice, timeout=30) as of_alice,
        httpx.stream("GET", url, headers=bob, timeout=30) as of_bob,
    ):
        still_open = of_bob.iter_lines()
        assert next(still_open) == "id: 1"
        KeyTable(store.engine).revoke("alice")
        # To its end, in order: an answer that is cut off raises.
        lines = list(islice(of_alice.iter_lines(), 300))  # heartbeats would go on for ever
        assert "id: 1" in lines
        assert len(lines) < 300
        store.append_event(job_id, "unit.started", {"unit_id": "0", "index": 0})
        assert "id: 2" in still_open
    assert httpx.get(url, headers=alice, timeout=30).status_code == 401


@pytest.mark.parametrize("value", [r'"\000.x"', r'"\012.x"', r'"a\000bcdefghijk.x"', ".", ".."])
def test_a_cookie_of_no_form_is_a_wrong_key(keys, store, value):
    """With a NUL in the id Postgres was asked, refused, and every such request was a 503 with a
    traceback in the log, which no limit counted."""
    client = client_of(store)
    client.app.state.gate._wrong._clock = lambda: 0.0  # stands still: nothing is forgiven
    cookie = {"Cookie": f"probe_session={value}".encode()}
    answers = [client.get("/v1/jobs", headers=cookie).status_code for _ in range(25)]
    assert answers == [401] * 20 + [429] * 5


@pytest.mark.parametrize("job_id", ["/tmp/elsewhere", "../../elsewhere", ".", "a/b", "job_\n"])
def test_a_server_does_not_say_where_an_export_is_written(client, submitted, tmp_path, job_id):
    """The folder is named after the id that the server tells, which was believed."""
    told = client.get(f"/v1/jobs/{submitted}").json() | {"id": job_id, "status": "failed"}
    evil = httpx.MockTransport(lambda _request: httpx.Response(200, json=told))
    with pytest.raises(ExportError, match="no job's id"):
        export_job(ProbeClient(LOOPBACK, transport=evil), submitted, tmp_path / "out")
    assert not (tmp_path / "out").exists()
