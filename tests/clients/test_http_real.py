"""`ProbeClient` against the real server, over a real socket."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from safetensors.numpy import save_file

from clients.errors import BadInputError, ConflictError, NotFoundError, UnauthorizedError
from clients.http import ProbeClient
from probe.result import UnitResult
from server.api.app import create_app
from server.settings import Settings
from server.store import SqlStore
from tests.ports import Ports


class Served:
    """The app on one port; it can be stopped and started again."""

    def __init__(self, settings: Settings, store: SqlStore) -> None:
        self._settings, self._store = settings, store
        self._ports = Ports()  # held between stop and start, too
        self.port = self._ports.take()
        self.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        app = create_app(self._settings, self._store, event_poll_s=0.02, heartbeat_s=0.2)
        config = uvicorn.Config(app, port=self.port, log_config=None, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._server.started:
            assert self._thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self.stop()
        self._ports.close()


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in ("PROBE_SERVER", "PROBE_API_KEY", "PROBE_API_KEYS", "PROBE_ROOTS"):
        monkeypatch.delenv(name, raising=False)
    return Settings(data_dir=tmp_path / "data")


@pytest.fixture
def store(settings: Settings) -> Iterator[SqlStore]:
    settings.data_dir.mkdir(parents=True)
    store = SqlStore(settings.database_url)
    yield store
    store.close()


@pytest.fixture
def served(settings: Settings, store: SqlStore) -> Iterator[Served]:
    served = Served(settings, store)
    yield served
    served.close()


@pytest.fixture
def client(served: Served) -> Iterator[ProbeClient]:
    with ProbeClient(served.address) as client:
        yield client


@pytest.fixture
def spec(wire: Any, tmp_path: Path) -> dict[str, Any]:
    for step in (0, 100):
        directory = tmp_path / "runs" / f"step-{step}"
        directory.mkdir(parents=True)
        (directory / "config.json").write_text('{"model_type": "llama"}')
        save_file({"w": np.zeros((2, 2), np.float32)}, str(directory / "model.safetensors"))
    (tmp_path / "text.txt").write_text("hello\n")
    files = [{"name": "web", "type": "files", "paths": [str(tmp_path / "text.txt")]}]
    return {
        **wire.spec,
        "checkpoints": {"source": "local", "path": str(tmp_path / "runs" / "step-*")},
        "batches": {**wire.spec["batches"], "sources": files},
    }


def test_submitting_twice_is_one_job(client: ProbeClient, spec: dict[str, Any]) -> None:
    first = client.submit(spec, idempotency_key="k")
    assert client.submit(spec, idempotency_key="k").id == first.id
    assert client.submit(spec).id != first.id
    with pytest.raises(BadInputError) as caught:
        client.submit(spec | {"name": "other"}, idempotency_key="k")
    assert caught.value.code == "idempotency_conflict"


def test_listing_follows_the_pages(client: ProbeClient, spec: dict[str, Any]) -> None:
    ids = [client.submit(spec | {"labels": {"n": str(i % 2)}}).id for i in range(5)]
    assert [job.id for job in client.iter_jobs()] == ids[::-1]
    odd = client.jobs(labels={"n": "1"}, limit=1)
    assert [job.id for job in odd.data] == [ids[3]]
    assert odd.has_more
    rest = client.jobs(labels={"n": "1"}, after=odd.data[-1].id, status="queued")
    assert [job.id for job in rest.data] == [ids[1]]


def test_a_wrong_spec_names_the_field(client: ProbeClient, spec: dict[str, Any]) -> None:
    wrong = spec | {"measurement": {"loss_batch": "update", "repeat": 2}}
    with pytest.raises(BadInputError) as caught:
        client.submit(wrong)
    assert caught.value.errors[0].field == "measurement.repeat"
    assert "repeats" in caught.value.errors[0].message


def test_plan_checkpoints_workers_and_readiness(client: ProbeClient, spec: dict[str, Any]) -> None:
    assert client.ready()
    assert [u.checkpoint.step for u in client.plan(spec).units] == [0, 100]
    assert [ref.step for ref in client.checkpoints(spec["checkpoints"]).data] == [0, 100]
    assert client.workers().data == []
    assert client.jobs().data == []


def test_unknown_jobs(client: ProbeClient) -> None:
    for job_id in ("job_0", "../workers", "", "\N{SNOWMAN}"):
        for ask in (client.job, client.cancel, client.results, client.chart):
            with pytest.raises(NotFoundError):
                ask(job_id)


def test_results_and_charts(
    client: ProbeClient, store: SqlStore, spec: dict[str, Any], wire: Any
) -> None:
    job = client.submit(spec)
    with pytest.raises(ConflictError, match="no finished unit"):
        client.chart(job.id)
    for index, value in enumerate((800.0, None)):
        store.record_unit(job.id, UnitResult.model_validate(wire.result(index, value)))
    found = client.results(job.id)
    assert [r.unit.index for r in found.data] == [0, 1]
    assert found.data[0].summaries[0].lambda_c_mean == 800.0
    assert client.results_file(job.id, "csv").startswith(b"unit_id,")
    assert client.results_file(job.id, "parquet")[:4] == b"PAR1"
    assert b"<svg" in client.chart(job.id, "svg")
    assert client.chart(job.id, "png")[:4] == b"\x89PNG"
    assert b"vega-lite" in client.chart(job.id, "vega")


def test_events_outlive_a_restart_of_the_server(
    served: Served, client: ProbeClient, store: SqlStore, spec: dict[str, Any]
) -> None:
    job = client.submit(spec)
    events = client.events(job.id)
    assert next(events).type == "job.queued"
    about = {"unit_id": "0000-step-0", "index": 0}
    store.append_event(job.id, "unit.started", about)
    assert next(events).type == "unit.started"
    served.stop()
    for done in range(3):
        store.append_event(job.id, "unit.progress", about | {"done": done, "total": 3})
    served.start()
    assert [next(events).data["done"] for _ in range(3)] == [0, 1, 2]
    client.cancel(job.id)
    rest = list(events)
    assert [event.type for event in rest] == ["job.cancelled"]
    assert rest[-1].id == 6
    assert list(client.events(job.id, after=6)) == []  # 204: nothing more will come
    assert client.wait(job.id, timeout_s=30).status == "cancelled"


def test_keys(tmp_path: Path, settings: Settings, store: SqlStore) -> None:
    locked = Settings(data_dir=settings.data_dir, api_keys=["right"])  # type: ignore[list-item]
    served = Served(locked, store)
    try:
        with ProbeClient(served.address, api_key="right") as client:
            assert client.jobs().data == []
        for key in (None, "wrong"):
            with ProbeClient(served.address, api_key=key) as client:
                assert client.ready()
                with pytest.raises(UnauthorizedError):
                    client.jobs()
                with pytest.raises(UnauthorizedError):
                    next(client.events("job_0"))
    finally:
        served.close()
