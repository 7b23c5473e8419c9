"""`/readyz` says what stands in the way, `/metrics` how requests go."""

import gc
import time

import sqlalchemy as sa
from fastapi.testclient import TestClient

from server import migrations
from server.api import __main__ as main
from server.api import app
from server.tables import ended_views
from tests.server.conftest import database_url  # noqa: F401 (on both databases)


def test_ready_tells_the_database_and_its_revision(client, store):
    found = client.get("/readyz").json()
    assert found.pop("status") == "ok"
    newest = migrations.newest_revision()
    assert found["migrations"] == {"ok": True, "found": newest, "needed": newest}
    latency_ms = found["database"].pop("latency_ms")
    assert 0 < latency_ms < 60_000
    assert found["database"] == {"ok": True, "dialect": store.engine.dialect.name}


def test_a_database_of_another_revision_is_not_ready(client, store):
    with store.engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["retry-after"]
    found = answer.json()
    assert found["code"] == "store_not_ready"
    needed = migrations.newest_revision()
    assert found["migrations"] == {"ok": False, "found": "9999", "needed": needed}
    assert found["database"]["ok"]


def test_a_database_without_the_tables_is_not_ready(client, store):
    with store.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE jobs RENAME TO elsewhere"))
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["code"]) == (503, "store_not_ready")
    assert answer.json()["database"]["ok"] is False
    assert answer.json()["migrations"]["found"] is None


def test_requests_are_timed_by_route(client, submitted):
    for _ in range(3):
        client.get(f"/v1/jobs/{submitted}")
    client.get("/nowhere/at/all")
    text = client.get("/metrics").text
    assert 'probe_http_request_seconds_count{method="GET",route="/v1/jobs/{job_id}"} 3.0' in text
    assert 'probe_http_request_seconds_count{method="GET",route="(none)"} 1.0' in text
    assert 'probe_http_requests_total{method="GET",route="(none)",status="404"} 1.0' in text
    assert submitted not in text


def test_a_server_writes_the_views_that_an_upgrade_left_missing(
    settings, store, submitted, monkeypatch
):
    assert store.cancel_job(submitted).status == "cancelled"
    with store.engine.begin() as connection:
        row = connection.execute(sa.select(ended_views)).one()
        connection.execute(sa.delete(ended_views))
    monkeypatch.setattr(app, "_FILL_PAUSE_S", 0.0)
    with TestClient(app.create_app(settings, store), "http://127.0.0.1") as fenced:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with store.engine.connect() as connection:
                found = connection.execute(sa.select(ended_views)).one_or_none()
            if found is not None:
                break
            time.sleep(0.01)
        assert found == row
        assert fenced.get(f"/v1/jobs/{submitted}").text == row.body


def test_what_a_server_has_imported_is_left_alone_by_the_garbage_collector(settings, monkeypatch):
    """A full pass over it stops every answer for a tenth of a second."""
    frozen = []
    monkeypatch.setattr("uvicorn.run", lambda *_args, **_kw: frozen.append(gc.get_freeze_count()))
    try:
        main._serve(None, settings)
    finally:
        gc.unfreeze()
    assert frozen[0] > 10_000
