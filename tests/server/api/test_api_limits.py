"""How much one caller may ask: requests, wrong keys, streams, sizes."""

import contextlib
import gc
import http.client
import socket
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from server.api import guard
from server.api.app import create_app
from server.api.http_head import MAX_HEAD_BYTES, BoundedHttpProtocol
from server.api.limits import Buckets, Slots, network_of, retry_after
from server.keys import KeyTable
from server.settings import Settings
from server.store import SqlStore

LOOPBACK = "http://127.0.0.1"
KEY = "the-right-key"


def client_of(store: SqlStore, address: str = "192.0.2.1", **settings: Any) -> TestClient:
    """Its app's clock stands still, however long requests take here."""
    app = create_app(Settings(**settings), store)
    gate = app.state.gate
    gate._requests._clock = gate._wrong._clock = lambda: 100.0
    return again(app, address)


def again(app: Any, address: str) -> TestClient:
    """Another client of the same app, from another address."""
    return TestClient(
        app,
        LOOPBACK,
        raise_server_exceptions=False,
        follow_redirects=False,
        client=(address, 50_000),
    )


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def code_of(answer: Any) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.json()["code"]


def test_a_bucket_gives_a_burst_and_then_its_rate():
    now = [100.0]
    buckets = Buckets(rate=2.0, burst=3, clock=lambda: now[0])
    assert [buckets.take("a") for _ in range(3)] == [0, 0, 0]
    assert buckets.take("a") == pytest.approx(1 / 2)  # one token takes 1 / rate
    assert buckets.take("b") == 0
    now[0] += 0.25
    assert buckets.take("a") == pytest.approx(1 / 4)  # half of one is there
    now[0] += 0.25
    assert buckets.take("a") == 0
    now[0] += 1e9
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0.5]  # never more than the burst


def test_over_a_long_time_nobody_gets_more_than_rate_and_burst():
    now = [0.0]
    buckets = Buckets(rate=10.0, burst=5, clock=lambda: now[0])
    granted = 0
    for step in range(100_000):  # 100 s at 1000 requests a second
        now[0] = step / 1000
        granted += buckets.take("a") == 0
    assert granted == pytest.approx(5 + 10 * 100, abs=1)


def test_however_many_ask_little_is_remembered():
    now = [0.0]
    buckets = Buckets(rate=1.0, burst=1, most=100, clock=lambda: now[0])
    for number in range(10_000):
        now[0] += 1e-6
        buckets.take(f"192.0.2.{number}")
        buckets.wait_s(f"198.51.100.{number}")
        buckets.take("the busy one")
        assert len(buckets) <= 100
    assert buckets.take("the busy one") > 0  # who asks all the time is not forgotten


def test_slots_are_given_back():
    slots = Slots(2)
    assert [slots.take("a"), slots.take("a"), slots.take("a"), slots.take("b")] == [
        *(True, True, False, True)
    ]
    slots.give_back("a")
    assert slots.take("a")
    for _ in range(2):
        slots.give_back("a")
    slots.give_back("b")
    assert len(slots) == 0


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1%eth0", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("", ""),
        ("testclient", "testclient"),
    ],
)
def test_an_ipv6_host_cannot_ask_from_all_of_its_addresses(address, network):
    assert network_of(address) == network


def test_retry_after_is_whole_seconds_and_never_zero():
    assert [retry_after(s) for s in (0.001, 1.0, 1.2, 59.9)] == ["1", "1", "2", "60"]


def test_requests_beyond_the_burst_are_refused_and_told_when(store):
    client = client_of(store, rate_limit_per_s=0.01, rate_limit_burst=3)
    assert [client.get("/v1/jobs").status_code for _ in range(4)] == [200, 200, 200, 429]
    refused = client.get("/v1/nothing")
    assert code_of(refused) == (429, "rate_limited")
    assert refused.headers["retry-after"] == "100"  # 1 / 0.01 s
    assert again(client.app, "192.0.2.2").get("/v1/jobs").status_code == 200
    # What restarts a server that fails is always answered.
    assert {client.get(p).status_code for p in ("/healthz", "/readyz")} == {200}


def test_each_key_has_its_own_limit_wherever_it_comes_from(store):
    table = KeyTable(store.engine)
    one, two = (table.create(name, "read")[1] for name in ("one", "two"))
    client = client_of(store, rate_limit_per_s=0.01, rate_limit_burst=2)
    other = again(client.app, "192.0.2.2")
    asked = [c.get("/v1/jobs", headers=bearer(one)).status_code for c in (client, other, client)]
    assert asked == [200, 200, 429]
    assert client.get("/v1/jobs", headers=bearer(two)).status_code == 200


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "X-Real-IP"])
def test_nobody_gets_a_new_address_by_saying_so(store, header):
    client = client_of(store, rate_limit_per_s=0.01, rate_limit_burst=2)
    said = [{header: f"198.51.100.{number}"} for number in range(3)]
    assert [client.get("/v1/jobs", headers=h).status_code for h in said] == [200, 200, 429]


@pytest.mark.parametrize("proxies", [None, "10.0.0.1"])
def test_a_proxy_is_believed_only_where_the_operator_names_it(monkeypatch, proxies):
    """uvicorn by itself believes whatever a program on this machine says in X-Forwarded-For."""
    import uvicorn

    from server.api.__main__ import _serve

    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    if proxies is not None:
        monkeypatch.setenv("FORWARDED_ALLOW_IPS", proxies)
    given: dict[str, Any] = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: given.update(options))
    try:
        _serve(None, Settings())
    finally:
        gc.unfreeze()
    assert given["proxy_headers"] is (proxies is not None)
    assert given["http"] is BoundedHttpProtocol
    assert "forwarded_allow_ips" not in given  # uvicorn reads the variable


def test_wrong_keys_are_limited_more_and_right_ones_go_on(store):
    client = client_of(store, api_keys=[SecretStr(KEY)])
    assert client.get("/v1/jobs", headers=bearer(KEY)).status_code == 200
    wrong = [
        client.get("/v1/jobs", headers=bearer(f"guess-{n}")).status_code
        for n in range(guard._WRONG_BURST + 1)
    ]
    assert wrong == [401] * guard._WRONG_BURST + [429]
    # A key that was right a moment ago is looked at; one never seen here is not, right or wrong.
    assert client.get("/v1/jobs", headers=bearer(KEY)).status_code == 200
    assert code_of(client.post("/login", data={"key": "guess"})) == (429, "rate_limited")
    fresh = client_of(store, api_keys=[SecretStr(KEY)])
    for number in range(guard._WRONG_BURST):
        assert fresh.post("/login", data={"key": f"guess-{number}"}).status_code == 401
    refused = fresh.get("/v1/jobs", headers=bearer(KEY))
    assert code_of(refused) == (429, "rate_limited")
    assert int(refused.headers["retry-after"]) == 1 / guard._WRONG_PER_S
    assert again(fresh.app, "192.0.2.9").get("/v1/jobs", headers=bearer(KEY)).status_code == 200


def test_event_streams_of_one_caller_are_counted(store, settings, spec):
    client = client_of(store, max_event_streams=1)
    job = client.post("/v1/jobs", json=spec).json()["id"]
    streams = client.app.state.gate.streams
    assert streams.take("192.0.2.1")  # one is open
    refused = client.get(f"/v1/jobs/{job}/events")
    assert code_of(refused) == (429, "too_many_streams")
    assert refused.headers["retry-after"]
    streams.give_back("192.0.2.1")
    client.post(f"/v1/jobs/{job}/cancel")
    assert client.get(f"/v1/jobs/{job}/events").status_code == 200
    assert client.get("/v1/jobs/none/events").status_code == 404
    assert len(streams) == 0


@pytest.mark.parametrize("way", ["declared", "chunked", "a lie"])
def test_a_body_beyond_the_limit_is_refused_however_it_is_sent(store, spec, way):
    client = client_of(store, max_body_bytes=4096)
    headers = {"Content-Type": "application/json"}
    assert client.post("/v1/jobs", json=spec).status_code == 202
    body = b'{"name": "' + b"x" * 4096 + b'"}'
    if way == "a lie":
        body, headers["Content-Length"] = b"{}", "99999999999999999999999"
    for path in ("/v1/jobs", "/v1/jobs:plan", "/v1/checkpoints"):
        content: Any = iter([body[:2000], body[2000:]]) if way == "chunked" else body
        answer = client.post(path, content=content, headers=headers)
        assert code_of(answer) == (413, "body_too_large")
        assert "4,096" in answer.json()["detail"]


def test_addresses_and_headers_have_a_size(client):
    assert code_of(client.get("/v1/jobs?after=" + "a" * 9000)) == (414, "uri_too_long")
    assert code_of(client.get("/" + "a" * 9000)) == (414, "uri_too_long")
    assert code_of(client.get("/v1/jobs", headers={"X": "a" * 33_000})) == (
        *(431, "headers_too_large"),
    )
    many = {f"X-{number}": "a" * 100 for number in range(400)}
    assert code_of(client.get("/v1/jobs", headers=many)) == (431, "headers_too_large")


@pytest.fixture
def bounded(monkeypatch, request):
    """The served app on the parser that `python -m server.api` uses."""
    import uvicorn

    made = uvicorn.Config
    monkeypatch.setattr(uvicorn, "Config", lambda *a, **k: made(*a, **k, http=BoundedHttpProtocol))
    return request.getfixturevalue("served")


def test_headers_that_never_end_end_the_connection(bounded):
    host, port = bounded.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
        answer = b""
        for number in range(10_000):  # some 10 MB, were they read
            try:
                connection.sendall(b"X-%d: %s\r\n" % (number, b"a" * 1000))
            except OSError:
                break
        else:
            pytest.fail("all of it was read")
        assert number * 1000 < 100 * MAX_HEAD_BYTES  # the rest is what the kernel holds
        with contextlib.suppress(OSError):
            answer = connection.recv(100)
        assert answer[:12] in (b"", b"HTTP/1.1 400")


def test_many_requests_on_one_connection_are_not_one_large_head(bounded):
    host = bounded.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=20)
    for _ in range(40):  # 80 kB of headers in all
        connection.request("GET", "/healthz", headers={"X-Filler": "a" * 2000})
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b'{"status":"ok"}')
    connection.request("POST", "/v1/jobs", b" " * 200_000, {"Content-Type": "application/json"})
    assert connection.getresponse().status == 400  # not JSON, but read
    connection.close()
