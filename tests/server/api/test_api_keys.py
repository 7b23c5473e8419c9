"""Keys of the database: what they open, when they stop to, what is kept of them."""

import hashlib
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from pydantic import SecretStr

from probe.errors import ConfigError
from server.api.app import create_app
from server.api.callers import CACHE_S, Keyring, of_key
from server.api.guard import ADMIN_PATHS
from server.keys import KEY_PATTERN, KeyNameError, KeyTable
from server.settings import Settings
from server.store import SqlStore
from server.tables import api_keys
from tests.server.conftest import database_url as database_url  # both kinds of database
from tests.server.conftest import dice_for_a_clock, on_sqlite_only

LOOPBACK = "http://127.0.0.1"
DAY_MS = 86_400_000


@pytest.fixture
def table(store: SqlStore) -> KeyTable:
    return KeyTable(store.engine)


def client_of(store: SqlStore, **settings: Any) -> TestClient:
    app = create_app(Settings(**settings), store)
    return TestClient(app, LOOPBACK, raise_server_exceptions=False, follow_redirects=False)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def code_of(answer: Any) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.json()["code"]


def test_a_key_lasts_as_long_as_asked_however_the_clock_goes_on_meanwhile(store, table):
    table._now = dice_for_a_clock(store.engine)
    stored, _ = table.create("ci", "submit", expires_days=30)
    assert stored.expires_at - stored.created_at == 30 * DAY_MS


def test_a_key_is_long_and_its_secret_is_nowhere(store, table):
    stored, key = table.create("ci", "submit", expires_days=30)
    key_id, secret = KEY_PATTERN.fullmatch(key).groups()
    assert key_id == stored.id
    assert len(secret) * 6 >= 256  # characters of base64: six bits each
    assert (stored.name, stored.scope, stored.status) == ("ci", "submit", "active")
    assert stored.expires_at - stored.created_at == 30 * DAY_MS
    with store.engine.connect() as connection:
        row = str(connection.execute(sa.select(api_keys)).one())
    assert secret not in row
    assert hashlib.sha256(secret.encode()).hexdigest() not in row  # nor what the cookie is made of
    assert of_key(key).token not in row
    assert secret not in repr(of_key(key)) + repr(stored)


def test_names_are_one_keys_for_ever(table):
    table.create("ci", "read")
    table.revoke("ci")
    with pytest.raises(KeyNameError, match="choose another name"):
        table.create("ci", "read")
    for name in ("", " ", "-x", "a/b", "a\nb", "x" * 101, "\u00e9"):
        with pytest.raises(KeyNameError, match="cannot name a key"):
            table.create(name, "read")
    with pytest.raises(KeyNameError, match="probe keys list"):
        table.revoke("nobody")
    assert [key.name for key in table.list()] == ["ci"]


def test_a_key_is_revoked_by_name_or_id_and_once(table):
    one, _ = table.create("one", "read")
    table.create("two", "read")
    first = table.revoke(one.id)
    assert table.revoke("one").revoked_at == first.revoked_at
    assert {key.name: key.status for key in table.list()} == {"one": "revoked", "two": "active"}


def test_use_is_noted_once_a_minute(store, table):
    stored, _ = table.create("ci", "read")
    table.note_use(stored)
    first = table.find(stored.id)
    assert first.last_used_at >= stored.created_at
    table.note_use(first)
    table.note_use(stored)  # another server, which read the row before: the database decides
    assert table.find(stored.id).last_used_at == first.last_used_at
    with store.engine.begin() as connection:
        connection.execute(sa.update(api_keys).values(last_used_at=first.last_used_at - 60_001))
    table.note_use(table.find(stored.id))
    assert table.find(stored.id).last_used_at >= first.last_used_at


def test_one_key_locks_every_door_also_once_it_is_revoked(store, table):
    client = client_of(store)
    assert client.get("/v1/jobs").status_code == 200
    client = client_of(store)
    _, key = table.create("only", "read")
    client.app.state.gate._keyring._clock = lambda: CACHE_S * 1e9  # what was known is old
    assert code_of(client.get("/v1/jobs")) == (401, "unauthorized")
    assert client.get("/v1/jobs", headers=bearer(key)).status_code == 200
    assert client.get("/healthz").status_code == 200
    table.revoke("only")
    fresh = client_of(store)
    assert code_of(fresh.get("/v1/jobs", headers=bearer(key))) == (401, "unauthorized")
    assert code_of(fresh.get("/v1/jobs")) == (401, "unauthorized")


def test_scopes_hold_each_other(store, table, spec, submitted):
    keys = {scope: table.create(scope, scope)[1] for scope in ("read", "submit", "admin")}
    client = client_of(store)

    def ask(scope: str, method: str, path: str, body: Any = None) -> Any:
        return client.request(method, path, headers=bearer(keys[scope]), json=body)

    for scope in keys:
        for path in ("/v1/jobs", f"/v1/jobs/{submitted}", "/v1/workers", "/metrics", "/"):
            assert ask(scope, "GET", path).status_code == 200
    posts = [
        ("/v1/jobs", spec, 202),
        ("/v1/jobs:plan", spec, 200),
        ("/v1/checkpoints", spec["checkpoints"], 200),
        (f"/v1/jobs/{submitted}/cancel", None, 200),
    ]
    for path, body, status in posts:
        refused = ask("read", "POST", path, body)
        assert code_of(refused) == (403, "scope_missing")
        assert "scope submit" in refused.json()["detail"]
        for scope in ("submit", "admin"):
            assert ask(scope, "POST", path, body).status_code == status
    for path in ADMIN_PATHS:
        assert code_of(ask("submit", "POST", path, {})) == (403, "scope_missing")
        assert ask("admin", "POST", path, {}).status_code not in (401, 403)
    urgent = spec | {"priority": 99}
    refused = ask("submit", "POST", "/v1/jobs", urgent)
    assert code_of(refused) == (403, "scope_missing")
    assert "scope admin" in refused.json()["detail"]
    accepted = ask("admin", "POST", "/v1/jobs", urgent).json()
    assert (accepted["priority"], accepted["submitted_by"]) == (99, "admin")
    assert ask("submit", "POST", "/v1/jobs", spec).json()["submitted_by"] == "submit"


def test_keys_of_the_environment_are_admins_and_go_beside_those_of_the_database(store, table, spec):
    _, key = table.create("ci", "read")
    client = client_of(store, api_keys=[SecretStr("first-key"), SecretStr("second-key")])
    job = client.post("/v1/jobs", json=spec | {"priority": 1}, headers=bearer("second-key")).json()
    assert job["submitted_by"] == "PROBE_API_KEYS/2"
    assert client.get("/v1/jobs", headers=bearer(key)).status_code == 200


def test_a_key_that_has_ended_opens_nothing(store, table):
    _, key = table.create("short", "admin", expires_days=1)
    client = client_of(store)
    assert client.get("/v1/jobs", headers=bearer(key)).status_code == 200
    with store.engine.begin() as connection:
        connection.execute(
            sa.update(api_keys).values(expires_at=sa.select(table._now).scalar_subquery())
        )
    assert table.list()[0].status == "expired"
    assert code_of(client_of(store).get("/v1/jobs", headers=bearer(key))) == (401, "unauthorized")


@on_sqlite_only
def test_what_the_database_said_is_believed_for_two_seconds(store, table):
    _, key = table.create("ci", "read")
    now = [0.0]
    keyring = Keyring(Settings(), table, clock=lambda: now[0])
    assert keyring.check(of_key(key)).name == "ci"
    table.revoke("ci")
    now[0] = CACHE_S - 0.01
    assert not keyring.needs_query(of_key(key))
    assert keyring.check(of_key(key)) is not None
    now[0] = CACHE_S
    assert keyring.needs_query(of_key(key))
    assert keyring.check(of_key(key)) is None
    assert CACHE_S <= 5


@on_sqlite_only
@pytest.mark.parametrize(
    "change",
    [
        lambda key: key[:-1] + ("A" if key[-1] != "A" else "B"),
        lambda key: key.upper(),
        lambda key: key + "x",
        lambda key: key[:-1],
        lambda key: "spk_" + "a" * 12 + key[16:],
        lambda key: key.replace("spk_", ""),
        lambda key: of_key(key).token,
        lambda key: f"{of_key(key).key_id}.{of_key(key).token}",
        lambda key: "spk_" + key[4:16] + "_" + of_key(key).token[:43],
        lambda key: "",
    ],
)
def test_nothing_but_the_key_is_the_key(store, table, change):
    _, key = table.create("ci", "admin")
    client = client_of(store)
    assert code_of(client.get("/v1/jobs", headers=bearer(change(key)))) == (401, "unauthorized")
    assert client.get("/v1/jobs", headers=bearer(key)).status_code == 200


@on_sqlite_only
def test_an_unknown_id_costs_the_same_comparison(table, monkeypatch):
    compared = []
    monkeypatch.setattr(
        "server.api.callers.hmac.compare_digest", lambda a, b: compared.append((a, b)) or False
    )
    _, key = table.create("ci", "read")
    keyring = Keyring(Settings(), table)
    for wrong in (key[:-4] + "AAAA", "spk_" + "z" * 12 + key[16:]):
        compared.clear()
        assert keyring.check(of_key(wrong)) is None
        assert [(len(a), len(b)) for a, b in compared] == [(64, 64)]


def test_the_dashboard_takes_a_key_and_keeps_what_ends_with_it(store, table):
    _, key = table.create("person", "read")
    client = client_of(store)
    answer = client.post("/login", data={"key": key})
    assert answer.status_code == 303
    assert key[17:] not in answer.headers["set-cookie"]
    cookie = client.cookies["probe_session"]
    assert client.get("/").status_code == 200
    assert code_of(client.post("/v1/jobs", json={})) == (403, "scope_missing")
    # The cookie is no key.
    bare = client_of(store)
    assert bare.get("/v1/jobs", headers=bearer(cookie)).status_code == 401
    table.revoke("person")
    ended = client_of(store)
    ended.cookies.set("probe_session", cookie)
    assert ended.get("/v1/jobs").status_code == 401


def test_another_address_than_loopback_is_served_once_the_database_has_a_key(
    store, table, tmp_path, database_url
):
    there = {"host": "0.0.0.0", "roots": [tmp_path], "database_url": database_url}
    for given in (store, None):
        with pytest.raises(ConfigError, match="probe keys create"):
            create_app(Settings(**there), given)
    table.create("first", "admin")
    client = TestClient(create_app(Settings(**there), store), "http://server.example")
    assert client.get("/v1/jobs").status_code == 401
    opened = create_app(Settings(**there))
    opened.state.store.close()
    with pytest.raises(ConfigError, match="PROBE_ROOTS"):
        create_app(Settings(host="0.0.0.0", database_url=database_url), store)


def test_refused_settings_leave_no_database_behind(tmp_path):
    url = f"sqlite:///{tmp_path}/none/probe.db"
    with pytest.raises(ConfigError):
        create_app(Settings(host="0.0.0.0", database_url=url, roots=[tmp_path]))
    assert not (tmp_path / "none").exists()


def test_a_database_that_is_gone_is_no_open_door(store, table, monkeypatch):
    _, key = table.create("ci", "read")
    client = client_of(store, api_keys=[SecretStr("fixed-key")])

    def lost(*_: Any) -> Any:
        raise sa.exc.OperationalError("SELECT", {}, Exception("no such host"))

    monkeypatch.setattr(KeyTable, "find", lost)
    assert code_of(client.get("/v1/workers", headers=bearer(key))) == (503, "store_not_ready")
    assert client.get("/v1/workers", headers=bearer("fixed-key")).status_code == 200
    assert client.get("/healthz").status_code == 200


@on_sqlite_only
def test_the_description_says_that_keys_are_needed(store, table):
    client = client_of(store)
    assert "securitySchemes" not in client.get("/openapi.json").json()["components"]
    table.create("ci", "read")
    document = client_of(store).get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for operation in operations.values():
            is_open = path in ("/healthz", "/readyz")
            assert ("401" in operation["responses"]) is not is_open
            assert "403" in operation["responses"]


def test_probe_keys_makes_lists_and_revokes(tmp_path):
    def probe(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "clients.cli.main", "keys", *words],
            capture_output=True,
            text=True,
            env=os.environ | {"PROBE_DATA_DIR": str(tmp_path)},
            timeout=120,
        )

    made = probe("create", "ci", "--scope", "submit", "--expires", "1.5")
    key = made.stdout.strip()
    assert (made.returncode, bool(KEY_PATTERN.fullmatch(key))) == (0, True), made.stderr
    assert key not in made.stderr
    listed = json.loads(probe("list", "--json").stdout)["data"]
    assert [(k["name"], k["scope"], k["status"]) for k in listed] == [("ci", "submit", "active")]
    assert key[17:] not in json.dumps(listed)
    assert probe("create", "ci", "--scope", "read").returncode == 2
    assert probe("revoke", "ci").returncode == 0
    assert "revoked" in probe("list").stdout
