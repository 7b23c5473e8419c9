"""The app on a real store in a temporary directory, and a small real series to submit."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from safetensors.numpy import save_file

from server import queue
from server.api.app import create_app
from server.settings import Settings
from server.store import SqlStore

LOOPBACK = "http://127.0.0.1"


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A directory with three checkpoints and a text file."""
    for step in (100, 200, 300):
        directory = tmp_path / "runs" / f"step-{step}"
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
        save_file({"w": np.zeros((2, 2), np.float32)}, str(directory / "model.safetensors"))
    (tmp_path / "text.jsonl").write_text('{"text": "hello"}\n')
    return tmp_path


@pytest.fixture
def spec(series_spec: dict[str, Any], workspace: Path) -> dict[str, Any]:
    """A job over the three checkpoints, as a client sends it."""
    series_spec["checkpoints"]["path"] = str(workspace / "runs" / "step-*")
    series_spec["batches"]["sources"][0]["paths"] = [str(workspace / "text.jsonl")]
    return series_spec


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    """SQLite only; a module that imports this fixture from `tests.server.conftest` has both."""
    return f"sqlite:///{tmp_path / 'data' / 'probe.db'}"


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return Settings(data_dir=tmp_path / "data", database_url=database_url, roots=[])


@pytest.fixture
def store(settings: Settings) -> Iterator[SqlStore]:
    store = SqlStore(settings.database_url)
    yield store
    store.close()


@pytest.fixture
def app(settings: Settings, store: SqlStore) -> FastAPI:
    return create_app(settings, store, event_poll_s=0.02, heartbeat_s=0.2)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, LOOPBACK, raise_server_exceptions=False, follow_redirects=False) as c:
        yield c


@pytest.fixture
def submitted(client: TestClient, spec: dict[str, Any]) -> str:
    """Id of a queued job."""
    return client.post("/v1/jobs", json=spec).json()["id"]


@pytest.fixture
def end_job(store: SqlStore) -> Callable[[str], None]:
    """Makes a job succeed, as the worker's workflow would."""

    def end(job_id: str) -> None:
        workflows = queue.workflow_status_table(store.engine)
        with store.engine.begin() as connection:
            connection.execute(
                sa.update(workflows)
                .where(workflows.c.workflow_uuid == job_id)
                .values(status="SUCCESS", completed_at=sa.literal_column("updated_at"))
            )

    return end


@pytest.fixture
def served(app: FastAPI) -> Iterator[str]:
    """The app behind a real socket; its address. For streams, which a test client collects."""
    config = uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"{LOOPBACK}:{port}"
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()
