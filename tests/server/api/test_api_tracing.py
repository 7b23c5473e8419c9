"""Traces: nothing when off, one trace from the request over the job to its units when on."""

import gzip
import http.server
import os
import subprocess
import sys
import threading
from typing import ClassVar

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from probe.errors import ConfigError
from server import tracing
from tests.server.jobs.conftest import lab  # noqa: F401

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def database_url(tmp_path):
    return f"sqlite:///{tmp_path / 'data' / 'probe.db'}"


@pytest.fixture
def spans():
    """Those that were made, once tracing has ended."""
    exporter = InMemorySpanExporter()
    tracing.set_up_tracing("test", exporter)

    def finished():
        tracing._provider.force_flush()
        return exporter.get_finished_spans()

    yield finished
    tracing.end_tracing()


def hexed(number, digits):
    return f"{number:0{digits}x}"


def test_nothing_is_made_or_imported_when_it_is_off(monkeypatch):
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert not tracing.set_up_tracing("test")
    with tracing.span("a", job_id="x") as span:
        span.set(more=1)
        span.failed("no")
        assert tracing.current_traceparent() is None
    code = (
        "import sys; from server import tracing; tracing.set_up_tracing('x')\n"
        "with tracing.span('a'): pass\n"
        "sys.exit('opentelemetry.sdk' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"sharpness-probe\[otel\]"):
        tracing.set_up_tracing("test")
    assert not tracing.is_on()


def test_a_span_hands_its_context_on_and_takes_one(spans):
    with tracing.span("outer", parent=PARENT, job_id="job_1", nothing=None):
        carried = tracing.current_traceparent()
    with tracing.span("inner", parent=carried), tracing.span("innermost"):
        pass
    outer, innermost, inner = spans()
    assert hexed(outer.context.trace_id, 32) == PARENT[3:35] == carried[3:35]
    assert hexed(outer.parent.span_id, 16) == PARENT[36:52]
    assert dict(outer.attributes) == {"probe.job_id": "job_1"}
    assert inner.parent.span_id == outer.context.span_id
    assert innermost.parent.span_id == inner.context.span_id


@pytest.mark.parametrize("parent", ["nonsense", "", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_context_that_is_none_begins_a_trace(spans, parent):
    with tracing.span("a", parent=parent):
        pass
    assert spans()[0].parent is None


def test_an_exception_marks_the_span_with_its_code_and_no_message(spans):
    with pytest.raises(ConfigError), tracing.span("a"):
        raise ConfigError("the password is hunter2")
    (span,) = spans()
    assert not span.status.is_ok
    assert span.attributes["error.type"] == "config_error"
    assert "hunter2" not in span.to_json()


def test_a_request_is_a_span_by_its_route_and_goes_on_in_the_job(spans, client, store, spec):
    submitted = client.post("/v1/jobs", json=spec, headers={"traceparent": PARENT}).json()["id"]
    client.get(f"/v1/jobs/{submitted}")
    client.get("/healthz")
    post, show = spans()
    assert (post.name, show.name) == ("POST /v1/jobs", "GET /v1/jobs/{job_id}")
    assert post.attributes["http.response.status_code"] == 202
    assert hexed(post.context.trace_id, 32) == PARENT[3:35]
    expected = f"00-{PARENT[3:35]}-{hexed(post.context.span_id, 16)}-01"
    assert store.traceparent(submitted) == expected
    assert show.parent is None
    assert submitted not in show.name


class Receiver(http.server.BaseHTTPRequestHandler):
    """Takes what an exporter sends over OTLP/HTTP."""

    found: ClassVar[list] = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        assert self.path == "/v1/traces"
        self.found.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_args):
        pass


@pytest.mark.slow
def test_a_worker_sends_spans_of_job_and_units_in_the_trace_of_the_request(
    lab,  # noqa: F811
    monkeypatch,
):
    Receiver.found = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        exporter = InMemorySpanExporter()
        tracing.set_up_tracing("test", exporter)
        with tracing.span("POST /v1/jobs"):
            parent = tracing.current_traceparent()
            job_id = lab.submit(num_units=2)
        tracing.end_tracing()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        worker = lab.start_worker()
        lab.until_status(job_id, "succeeded")
        worker.terminate()
        assert worker.wait(60) == 0  # sends what is left
    finally:
        server.shutdown()
        server.server_close()
    spans = [
        span
        for request in Receiver.found
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
        if scope.scope.name == "sharpness-probe"
    ]
    by_name = {}
    for span in spans:
        by_name.setdefault(span.name, []).append(span)
    (job,) = by_name["job"]
    assert len(by_name["unit"]) == 2
    assert {span.trace_id.hex() for span in spans} == {parent[3:35]}
    assert job.parent_span_id.hex() == parent[36:52]
    assert {span.parent_span_id for span in by_name["unit"]} == {job.span_id}
    attributes = {a.key: a.value for a in by_name["unit"][0].attributes}
    assert attributes["probe.job_id"].string_value == job_id
    assert attributes["probe.num_forward_passes"].int_value == 4
    assert os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] not in str(spans)
