"""Wire objects and a small in-memory server that speaks `/v1` through `httpx.MockTransport`."""

import datetime as dt
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from clients.http import ProbeClient
from server.wire import TERMINAL

SPEC: dict[str, Any] = {
    "kind": "checkpoint_series",
    "name": "tiny",
    "checkpoints": {"source": "local", "path": "runs/step-*"},
    "batches": {
        "sources": [{"name": "web", "type": "files", "paths": ["web.txt"]}],
        "sequence_length": 16,
        "batch_sequences": 2,
    },
    "measurement": {"loss_batch": "update"},
}


def job_json(job_id: str = "job_01aa", status: str = "queued", **changes: Any) -> dict[str, Any]:
    return {
        "id": job_id,
        "kind": "checkpoint_series",
        "name": "tiny",
        "labels": {},
        "status": status,
        "created_at": "2026-01-02T03:04:05Z",
        "num_units": 2,
        "num_units_finished": 0,
        "num_units_without_answer": 0,
        "num_forward_passes": 0,
        "expected_forward_passes": 8,
        "spec": SPEC,
        "spec_sha256": "0" * 64,
        **changes,
    }


def summary_json(lambda_c: float | None, passes: int = 4) -> dict[str, Any]:
    found = lambda_c is not None
    return {
        "loss_batch": "update",
        "num_repeats": 1,
        "num_converged": int(found),
        "lambda_c_mean": lambda_c,
        "lambda_c_standard_error": None,
        "lambda_c_values": [lambda_c],
        "lambda_c_lower": lambda_c and lambda_c * 0.97,
        "lambda_c_upper": lambda_c and lambda_c * 1.03,
        "loss_mean": 3.25,
        "outcomes": {"converged" if found else "no_crossing": 1},
        "num_forward_passes": passes,
    }


def result_json(index: int = 0, lambda_c: float | None = 800.0) -> dict[str, Any]:
    found = lambda_c is not None
    eta = 2 / lambda_c if lambda_c else None
    measurement = {
        "repeat": 0,
        "loss_batch": "update",
        "outcome": "converged" if found else "no_crossing",
        "eta_c": eta,
        "eta_lower": (eta or 1e6) * 0.97,
        "eta_upper": eta and eta * 1.03,
        "eta_interpolated": eta,
        "lambda_c": lambda_c,
        "loss_at_zero": 3.25,
        "slope": -0.7,
        "num_forward_passes": 4,
        "num_extra_sign_changes": 0,
        "trials": [[1e-3, 3.2]],
        "loss_resolution": 1e-7,
        "update_batch_sha256": "a" * 64,
        "loss_batch_sha256": "a" * 64,
        "duration_s": 0.5,
    }
    moment = "2026-01-02T03:04:05Z"
    return {
        "unit": {
            "index": index,
            "unit_id": f"{index:04d}-step-{index * 100}",
            "checkpoint": {"source": "local", "location": f"runs/{index}", "step": index * 100},
            "learning_rate": 1e-3,
        },
        "spec": SPEC,
        "measurements": [measurement],
        "summaries": [summary_json(lambda_c)],
        "stability_threshold": 2000.0,
        "num_forward_passes": 4,
        "num_backward_passes": 1,
        "duration_s": 1.5,
        "memory_bytes": 1 << 20,
        "provenance": {
            "spec_sha256": "0" * 64,
            "versions": {"python": "3.11"},
            "git_commit": None,
            "device": "cpu (1 threads)",
            "dtype": "float32",
            "attention": "sdpa",
            "moments": "checkpoint",
            "moments_detail": "read from the checkpoint",
            "num_parameters": 1000,
            "hostname": "here",
            "started_at": moment,
            "finished_at": moment,
        },
    }


def event_json(event_id: int, event_type: str, **data: Any) -> dict[str, Any]:
    at = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC) + dt.timedelta(seconds=event_id)
    return {"id": event_id, "type": event_type, "at": at.isoformat(), "data": data}


def stream_text(events: list[dict[str, Any]]) -> str:
    return "".join(f"id: {e['id']}\nevent: {e['type']}\ndata: {json.dumps(e)}\n\n" for e in events)


class FakeServer:
    """Answers by table: (method, path) -> a function of the request. Records every request."""

    def __init__(self) -> None:
        self.routes: dict[tuple[str, str], Callable[[httpx.Request], httpx.Response]] = {}
        self.requests: list[httpx.Request] = []
        self.jobs: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.pauses: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        path = request.url.raw_path.decode().partition("?")[0]
        route = self.routes.get((request.method, path)) or self._usual(request.method, path)
        if route is None:
            return problem(404, "not_found", f"no job {path.rsplit('/', 1)[-1]!r}")
        return route(request)

    def _usual(self, method: str, path: str) -> Callable[[httpx.Request], httpx.Response] | None:
        job = next((j for j in self.jobs if path.startswith(f"/v1/jobs/{j['id']}")), None)
        if method == "POST" and path == "/v1/jobs":
            return self._submit
        if method == "GET" and path == "/v1/jobs":
            return lambda _: httpx.Response(
                200, json={"object": "list", "data": self.jobs, "has_more": False}
            )
        if job is None:
            return None
        rest = path.removeprefix(f"/v1/jobs/{job['id']}")
        page = {"job_id": job["id"], "status": job["status"], "data": self.results}
        end = job["status"] if job["status"] in TERMINAL else "cancelled"
        answers = {
            "": lambda _: httpx.Response(200, json=job),
            "/results": lambda _: httpx.Response(200, json=page),
            "/events": self._events,
            "/cancel": lambda _: httpx.Response(200, json=job | {"status": end}),
        }
        return answers.get(rest)

    def _submit(self, request: httpx.Request) -> httpx.Response:
        job = job_json("job_01new", spec=json.loads(request.content))
        self.jobs.insert(0, job)
        return httpx.Response(202, json=job)

    def _events(self, request: httpx.Request) -> httpx.Response:
        after = int(request.headers.get("last-event-id", 0))
        text = stream_text([e for e in self.events if e["id"] > after])
        return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})

    def client(self, **options: Any) -> ProbeClient:
        """A client of this server that never really waits: every pause moves its clock."""
        now = [0.0]

        def sleep(seconds: float) -> None:
            self.pauses.append(seconds)
            now[0] += seconds

        return ProbeClient(
            "http://probe.test",
            transport=httpx.MockTransport(self),
            sleep=sleep,
            clock=lambda: now[0],
            **options,
        )


def problem(
    status: int, code: str, detail: str, errors: list[dict[str, str]] | None = None
) -> httpx.Response:
    body = {"type": "about:blank", "title": code, "status": status, "detail": detail, "code": code}
    return httpx.Response(
        status,
        json=body | {"errors": errors or []},
        headers={"content-type": "application/problem+json"},
    )


class Wire:
    """The builders above, for tests that take the fixture."""

    spec = SPEC
    job = staticmethod(job_json)
    result = staticmethod(result_json)
    summary = staticmethod(summary_json)
    event = staticmethod(event_json)
    problem = staticmethod(problem)
    stream = staticmethod(stream_text)


@pytest.fixture
def wire() -> type[Wire]:
    return Wire


@pytest.fixture
def fake_server() -> FakeServer:
    return FakeServer()


class CommandLine:
    """Runs `probe` in this process, against the fake server."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server

    def __call__(self, *words: str) -> Any:
        from typer.testing import CliRunner

        from clients.cli.main import app

        return CliRunner().invoke(app, list(words))


@pytest.fixture
def probe(fake_server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    monkeypatch.setattr("clients.http.ProbeClient", lambda url=None, **_: fake_server.client())
    for name in ("PROBE_SERVER", "PROBE_API_KEY", "PROBE_DATA_DIR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    return CommandLine(fake_server)
