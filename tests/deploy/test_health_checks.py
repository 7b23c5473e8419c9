"""What `--check` of server and worker says, by exit status and in one sentence."""

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import sqlalchemy as sa

from server import tables
from server.api import check as server_check
from server.settings import Settings
from server.store import SqlStore
from server.worker import __main__ as worker_command
from server.worker import check as worker_check

STALE_S = 60


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", worker_name="w", worker_stale_s=STALE_S)


@pytest.fixture
def store(settings: Settings) -> Iterator[SqlStore]:
    store = SqlStore(settings.database_url)
    yield store
    store.close()


def report(store: SqlStore, *, silent_ms: int = 0, stopped: bool = False) -> None:
    """Write the row that a worker writes, as old as asked for."""
    beat = tables.now_ms(store.engine) - silent_ms
    row = {"name": "w", "last_heartbeat": beat, "stopped": stopped, "view": {}}
    with store.engine.begin() as connection:
        connection.execute(sa.insert(tables.workers).values(row))


def test_a_fresh_heartbeat_is_well(settings: Settings, store: SqlStore) -> None:
    report(store, silent_ms=1000 * STALE_S - 30_000)
    assert worker_check.what_is_wrong(settings) is None


def test_an_old_one_is_not(settings: Settings, store: SqlStore) -> None:
    report(store, silent_ms=1000 * STALE_S + 1)
    problem = worker_check.what_is_wrong(settings) or ""
    found = re.search(r"has been silent for (\d+) s, allowed are 60 s", problem)
    assert found, problem
    assert int(found[1]) >= STALE_S  # and what it took to ask


def test_one_that_said_goodbye_is_not(settings: Settings, store: SqlStore) -> None:
    report(store, stopped=True)
    assert worker_check.what_is_wrong(settings) == "worker 'w' has stopped"


def test_one_that_was_never_there_is_not(settings: Settings, store: SqlStore) -> None:
    assert "no worker named 'w'" in (worker_check.what_is_wrong(settings) or "")


def test_asking_makes_no_database(settings: Settings) -> None:
    assert "there is no database" in (worker_check.what_is_wrong(settings) or "")
    assert not settings.data_dir.exists()


def test_a_database_that_is_away_is_named_without_its_password(tmp_path: Path) -> None:
    settings = Settings(database_url=f"postgresql://u:s3cret@/probe?host={tmp_path}")
    problem = worker_check.what_is_wrong(settings)
    assert problem is not None
    assert "the database cannot be asked" in problem
    assert "s3cret" not in problem


def test_the_worker_command_ends_with_what_was_found(
    settings: Settings, store: SqlStore, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--check", "--name", "w", "--data-dir", str(settings.data_dir)]
    assert worker_command.main(arguments) == 1
    assert "no worker named 'w'" in capsys.readouterr().err
    report(store)
    assert worker_command.main(arguments) == 0
    assert capsys.readouterr().err == ""


@pytest.fixture(params=[200, 503])
def answering(request: pytest.FixtureRequest) -> Iterator[tuple[int, Settings]]:
    """Something that answers /readyz with a status, and the settings to find it by."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"detail": "the database does not answer"}'
            self.send_response(request.param if self.path == "/readyz" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield request.param, Settings(host="0.0.0.0", port=server.server_port)
        server.shutdown()
        thread.join()


def test_a_server_is_well_when_it_says_so(
    answering: tuple[int, Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # it is this machine that is asked
    status, settings = answering
    problem = server_check.what_is_wrong(settings)
    if status == 200:
        assert problem is None
    else:
        assert problem is not None
        assert "/readyz answers 503" in problem
        assert "the database does not answer" in problem


def test_a_server_that_is_not_there_is_not_well() -> None:
    problem = server_check.what_is_wrong(Settings(host="::", port=1))
    assert problem is not None
    assert problem.startswith("http://[::1]:1/readyz does not answer")
