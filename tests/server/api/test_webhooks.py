"""Webhooks of jobs: who may be told; that every end is told, signed, and to nobody else."""

import asyncio
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from pydantic import SecretStr

from clients.webhooks import WebhookSignatureError, verify_webhook
from server import store as store_module
from server import webhook_sender
from server.api.app import create_app
from server.settings import Settings
from server.store import SqlStore
from server.tables import webhook_deliveries
from server.webhook_sender import WebhookSender, delay_ms
from tests.server.conftest import database_url as database_url  # both kinds of database
from tests.server.conftest import on_sqlite_only

LOOPBACK = "http://127.0.0.1"
SECRET = "a webhook secret for tests"
DEADLINE_S = 30.0


class Receiver:
    """A web server that answers what it is told to, in order, and then 204."""

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[int] = []
        self.hold: threading.Event | None = None
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                receiver.requests.append((dict(self.headers), body))
                if receiver.hold is not None:
                    receiver.hold.wait(DEADLINE_S)
                status = receiver.answers.pop(0) if receiver.answers else 204
                self.send_response(status)
                if status in (301, 302, 307, 308):
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.host}/hook/path-that-is-a-secret?token=in-the-address"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        if self.hold is not None:
            self.hold.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(DEADLINE_S)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def allowed(receiver: Receiver, database_url: str) -> Settings:
    return Settings(
        webhook_secret=SecretStr(SECRET), webhook_hosts=[receiver.host], database_url=database_url
    )


@pytest.fixture
def ended(store: SqlStore, spec: Any, receiver: Receiver, allowed: Settings, end_job: Any) -> Any:
    """Makes jobs with a webhook that have succeeded; the id of each."""
    client = TestClient(create_app(allowed, store), LOOPBACK)

    def make(url: str = receiver.url) -> str:
        answer = client.post("/v1/jobs", json=spec | {"webhook": url})
        assert answer.status_code == 202, answer.text
        job_id: str = answer.json()["id"]
        end_job(job_id)
        store.settle(job_id)
        return job_id

    return make


def rows(store: SqlStore) -> list[Any]:
    with store.engine.connect() as connection:
        return list(connection.execute(sa.select(webhook_deliveries)).all())


def change(store: SqlStore, **values: Any) -> None:
    with store.engine.begin() as connection:
        connection.execute(sa.update(webhook_deliveries).values(**values))


def is_done(store: SqlStore) -> bool:
    return all(row.next_attempt_at is None for row in rows(store))


def send(
    store: SqlStore, settings: Settings, until: Callable[[], bool], *, num_senders: int = 1
) -> None:
    """Run senders until the condition holds."""

    async def run() -> None:
        senders = [
            asyncio.create_task(WebhookSender(store.engine, settings, poll_s=0.01).run())
            for _ in range(num_senders)
        ]
        deadline = time.monotonic() + DEADLINE_S
        while not await asyncio.to_thread(until):
            assert time.monotonic() < deadline, rows(store)
            await asyncio.sleep(0.01)
        for sender in senders:
            sender.cancel()
        await asyncio.gather(*senders, return_exceptions=True)

    asyncio.run(run())


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed attempts are repeated without a wait."""
    monkeypatch.setattr(webhook_sender, "delay_ms", lambda num_attempts: 0)


@on_sqlite_only
def test_jobs_with_other_webhooks_are_refused(store, spec, receiver, allowed):
    def code_and_field(settings: Settings, url: str) -> Any:
        client = TestClient(create_app(settings, store), LOOPBACK)
        answer = client.post("/v1/jobs", json=spec | {"webhook": url})
        assert answer.status_code == 422
        assert url not in answer.text
        return answer.json()["code"], answer.json()["errors"][0]["field"]

    refused = ("webhook_not_allowed", "webhook")
    assert code_and_field(allowed, "https://evil.example/secret-path") == refused
    assert code_and_field(Settings(webhook_hosts=[receiver.host]), receiver.url) == refused
    assert code_and_field(Settings(webhook_secret=SecretStr(SECRET)), receiver.url) == refused
    assert code_and_field(allowed, "ftp://127.0.0.1/x")[0] == "config_error"
    assert store.list_jobs() == ([], False)


# --- that every end is told


def test_an_end_is_told_once_and_signed(store, ended, receiver, allowed):
    job_id = ended()
    store.settle(job_id)  # again: nothing more
    (row,) = rows(store)
    send(store, allowed, lambda: is_done(store))
    ((headers, body),) = receiver.requests
    event = verify_webhook(SECRET, headers["X-Probe-Signature"], body)
    assert event["type"] == "job.succeeded"
    assert event["delivery"] == headers["X-Probe-Delivery"] == row.id
    assert (event["job"]["id"], event["job"]["status"]) == (job_id, "succeeded")
    assert event["timestamp"] == store.events_after(job_id, 0)[-1].at.isoformat()
    assert "spec" not in event["job"]
    assert headers["Host"] == receiver.host
    with pytest.raises(WebhookSignatureError):
        verify_webhook("another secret of sixteen", headers["X-Probe-Signature"], body)
    (row,) = rows(store)
    assert (row.num_attempts, row.last_error) == (1, None)
    assert row.delivered_at >= row.created_at


def test_a_cancelled_job_tells_of_it_and_one_without_a_webhook_does_not(
    store, spec, receiver, allowed
):
    client = TestClient(create_app(allowed, store), LOOPBACK)
    for webhook in ({"webhook": receiver.url}, {}):
        job_id = client.post("/v1/jobs", json=spec | webhook).json()["id"]
        client.post(f"/v1/jobs/{job_id}/cancel")
    (row,) = rows(store)
    assert json.loads(row.body)["type"] == "job.cancelled"
    assert json.loads(row.body)["job"]["status"] == "cancelled"


@on_sqlite_only
def test_the_address_is_in_no_answer(store, ended, allowed):
    job_id = ended()
    client = TestClient(create_app(allowed, store), LOOPBACK)
    for path in ("/v1/jobs", f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}/events", f"/jobs/{job_id}"):
        assert "path-that-is-a-secret" not in client.get(path).text


def test_no_end_without_its_delivery(store, ended, monkeypatch):
    """Closing event and delivery are written together or not at all."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("killed here")

    with monkeypatch.context() as patch:
        patch.setattr(store_module.webhooks, "queue_delivery", fail)
        with pytest.raises(RuntimeError):
            ended()
    (job,), _ = store.list_jobs()
    with store.engine.connect() as connection:
        types = connection.scalars(sa.text("SELECT type FROM events")).all()
    assert types == ["job.queued"]
    store.settle(job.id)
    assert len(rows(store)) == 1


@on_sqlite_only
def test_what_fails_is_sent_again_under_the_same_id(store, ended, receiver, allowed, at_once):
    ended()
    receiver.answers = [500, 302, 404, 429]
    send(store, allowed, lambda: is_done(store))
    assert len(receiver.requests) == 5  # none went to the redirect's target
    assert len({headers["X-Probe-Delivery"] for headers, _ in receiver.requests}) == 1
    assert len({body for _, body in receiver.requests}) == 1
    (row,) = rows(store)
    assert (row.num_attempts, row.last_error) == (5, None)


def test_waits_grow_to_an_hour_and_end_after_a_day(store, ended, receiver, allowed, monkeypatch):
    assert [delay_ms(n) / 1000 for n in (1, 2, 3, 9, 10, 1000)] == [10, 20, 40, 2560, 3600, 3600]
    ended()
    receiver.answers = [500, 500]
    send(store, allowed, lambda: rows(store)[0].last_error is not None)
    (row,) = rows(store)
    assert row.last_error == "the host answered 500"
    assert 9_000 < row.next_attempt_at - row.created_at < 10_000 + DEADLINE_S * 1000
    day = 86_400_000
    change(store, created_at=row.created_at - day, next_attempt_at=row.created_at)
    send(store, allowed, lambda: is_done(store))
    (row,) = rows(store)
    assert (row.num_attempts, row.delivered_at) == (2, None)


@on_sqlite_only
def test_a_host_that_says_gone_is_left_alone(store, ended, receiver, allowed):
    ended()
    receiver.answers = [410]
    send(store, allowed, lambda: is_done(store))
    assert (len(receiver.requests), rows(store)[0].delivered_at) == (1, None)


def test_what_a_killed_server_held_is_sent_by_another(store, ended, receiver, allowed):
    ended()
    killed = WebhookSender(store.engine, allowed)
    assert killed._claim() is not None  # and then nothing more
    other = WebhookSender(store.engine, allowed)
    assert other._claim() is None  # the claim holds
    change(store, next_attempt_at=webhook_deliveries.c.next_attempt_at - webhook_sender._LEASE_MS)
    send(store, allowed, lambda: is_done(store))
    assert (len(receiver.requests), rows(store)[0].num_attempts) == (1, 2)


def test_two_servers_do_not_both_send(store, ended, receiver, allowed):
    for _ in range(12):
        ended()
    send(store, allowed, lambda: is_done(store), num_senders=3)
    sent = [headers["X-Probe-Delivery"] for headers, _ in receiver.requests]
    assert len(sent) == len(set(sent)) == 12


def test_a_late_failure_does_not_undo_a_delivery(store, ended, allowed):
    ended()
    sender = WebhookSender(store.engine, allowed)
    delivery = sender._claim()
    sender._note(delivery, None)
    sender._note(delivery, webhook_sender.DeliveryError("late"))
    (row,) = rows(store)
    assert (row.next_attempt_at, row.last_error) == (None, None)


# --- and nobody else


@on_sqlite_only
def test_the_list_counts_again_before_each_sending(store, ended, receiver, allowed, at_once):
    ended()
    now = allowed.model_copy(update={"webhook_hosts": ["elsewhere.example"]})
    send(store, now, lambda: rows(store)[0].num_attempts >= 2)
    assert receiver.requests == []
    assert rows(store)[0].last_error == "its host is not allowed any more"


@on_sqlite_only
@pytest.mark.parametrize("answers", [["169.254.169.254"], ["93.184.215.14", "127.0.0.1"], []])
def test_nothing_goes_where_a_name_must_not_lead(
    store, ended, receiver, allowed, monkeypatch, answers
):
    port = receiver.host.partition(":")[2]
    hooks = allowed.model_copy(update={"webhook_hosts": [f"hooks.example:{port}", receiver.host]})
    ended()
    change(store, url=f"https://hooks.example:{port}/x")

    async def resolve(self: Any, host: str, port: int) -> list[str]:
        if not answers:
            raise OSError("no such host")
        return answers

    monkeypatch.setattr(WebhookSender, "_resolve", resolve)
    send(store, hooks, lambda: rows(store)[0].last_error is not None)
    assert receiver.requests == []
    why = "its name resolved to" if answers else "its host has no address"
    assert rows(store)[0].last_error.startswith(why)


@on_sqlite_only
def test_a_name_that_cannot_be_one_is_a_failed_try(store, ended, allowed):
    """Asking for a part of more than 63 letters is no OSError; it must be noted all the same."""
    hooks = allowed.model_copy(update={"webhook_hosts": ["*.corp.example"]})
    ended()
    change(store, url=f"https://{'a' * 64}.corp.example/x")
    send(store, hooks, lambda: rows(store)[0].last_error is not None)
    assert rows(store)[0].last_error == "its host has no address"


@on_sqlite_only
def test_an_address_is_asked_for_once_and_connected_to(
    store, ended, receiver, allowed, monkeypatch
):
    """A second answer of a name server could be another: the first one's address is used."""
    host, _, port = receiver.host.partition(":")
    ended()
    change(store, url=f"http://localhost:{port}/x")
    asked = []

    async def resolve(self: Any, name: str, port: int) -> list[str]:
        asked.append(name)
        return [host]

    monkeypatch.setattr(WebhookSender, "_resolve", resolve)
    local = allowed.model_copy(update={"webhook_hosts": [f"localhost:{port}"]})
    send(store, local, lambda: is_done(store))
    assert asked == ["localhost"]
    ((headers, _),) = receiver.requests
    assert headers["Host"] == f"localhost:{port}"


@on_sqlite_only
def test_proxies_of_the_environment_are_not_asked(store, ended, receiver, allowed, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    ended()
    send(store, allowed, lambda: is_done(store))
    assert rows(store)[0].delivered_at


@on_sqlite_only
def test_a_host_that_does_not_answer_holds_nobody_up(store, ended, receiver, allowed, monkeypatch):
    monkeypatch.setattr(webhook_sender, "_TIMEOUT_S", 0.2)
    receiver.hold = threading.Event()
    ended()
    send(store, allowed, lambda: rows(store)[0].last_error is not None)
    assert rows(store)[0].last_error == "no answer within 0.2 s"


@on_sqlite_only
def test_errors_and_logs_hold_no_address(store, ended, allowed, receiver, caplog):
    caplog.set_level("DEBUG", "server")
    receiver.close()
    ended()
    send(store, allowed, lambda: rows(store)[0].last_error is not None)
    assert rows(store)[0].last_error == "ConnectError on the way to the host"
    assert "path-that-is-a-secret" not in caplog.text
    assert "in-the-address" not in caplog.text
    assert SECRET not in caplog.text
    receiver.__init__()  # so that the fixture has one to close


@on_sqlite_only
def test_without_a_secret_nothing_is_sent(store, ended, receiver):
    ended()
    asyncio.run(WebhookSender(store.engine, Settings(), poll_s=0.01).run())
    assert receiver.requests == []


@on_sqlite_only
def test_the_app_sends_while_it_runs(store, ended, receiver, allowed):
    ended()
    with TestClient(create_app(allowed, store), LOOPBACK):
        deadline = time.monotonic() + DEADLINE_S
        while not is_done(store):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert len(receiver.requests) == 1
