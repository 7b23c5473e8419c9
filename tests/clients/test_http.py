"""`ProbeClient` against answers written by hand: what it sends, reads, repeats and raises."""

import json
from typing import Any

import httpx
import pytest

from clients.errors import (
    ApiError,
    BadInputError,
    ConflictError,
    JobFailedError,
    NotFoundError,
    OverloadedError,
    ProtocolError,
    ServerUnavailableError,
    UnauthorizedError,
    WaitTimeoutError,
)
from clients.http import ProbeClient
from probe.spec_load import parse_spec


def test_submit_sends_the_spec_and_a_fresh_key(fake_server: Any, wire: Any) -> None:
    with fake_server.client(api_key="secret") as client:
        job = client.submit(wire.spec)
        client.submit(parse_spec(wire.spec), idempotency_key="mine")
    first, second = fake_server.requests
    assert job.id == "job_01new"
    assert json.loads(first.content) == wire.spec
    assert first.headers["authorization"] == "Bearer secret"
    assert len(first.headers["idempotency-key"]) >= 32
    assert second.headers["idempotency-key"] == "mine"
    assert json.loads(second.content)["model"]["dtype"] == "float32"  # a model is sent resolved


def test_address_and_key_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROBE_SERVER", "http://elsewhere:1/")
    monkeypatch.setenv("PROBE_API_KEY", "k")
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200)

    with ProbeClient(transport=httpx.MockTransport(answer)) as client:
        assert client.ready()
    assert str(seen[0].url) == "http://elsewhere:1/readyz"
    assert seen[0].headers["authorization"] == "Bearer k"


def test_what_no_header_can_carry_is_said_before_it_is_sent(fake_server: Any, wire: Any) -> None:
    with pytest.raises(ProtocolError, match="the API key holds"):
        fake_server.client(api_key="\u043a\u043b\u044e\u0447")
    with fake_server.client() as client, pytest.raises(BadInputError, match="visible ASCII"):
        client.submit(wire.spec, idempotency_key="\u043a\u043b\u044e\u0447")
    assert fake_server.requests == []


def test_an_address_without_a_scheme_is_no_address() -> None:
    with (
        ProbeClient("localhost:8765") as client,
        pytest.raises(ProtocolError, match="'localhost:8765' is not a server address"),
    ):
        client.jobs()


def test_a_field_is_named_once(fake_server: Any, wire: Any) -> None:
    errors = [{"field": "a", "message": "is wrong"}, {"field": "b", "message": "too"}]
    fake_server.routes["GET", "/v1/jobs/x"] = lambda _: wire.problem(
        422, "config_error", "a: is wrong; and 1 more", errors
    )
    with fake_server.client() as client, pytest.raises(BadInputError) as caught:
        client.job("x")
    assert str(caught.value) == "a: is wrong; and 1 more\n  b: too"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, BadInputError),
        (401, UnauthorizedError),
        (403, UnauthorizedError),
        (404, NotFoundError),
        (409, ConflictError),
        (422, BadInputError),
        (429, OverloadedError),
        (503, OverloadedError),
        (500, ApiError),
    ],
)
def test_problems_become_exceptions(
    fake_server: Any, wire: Any, status: int, kind: type[ApiError]
) -> None:
    errors = [{"field": "batches.seed", "message": "must be a number"}]
    fake_server.routes["GET", "/v1/jobs/x"] = lambda _: wire.problem(status, "why", "so", errors)
    with fake_server.client(retries=0) as client, pytest.raises(ApiError) as caught:
        client.job("x")
    assert type(caught.value) is kind
    assert (caught.value.status, caught.value.code, caught.value.detail) == (status, "why", "so")
    assert [e.field for e in caught.value.errors] == ["batches.seed"]
    assert str(caught.value) == "so\n  batches.seed: must be a number"


def test_an_answer_that_is_no_problem_still_says_what_happened(fake_server: Any) -> None:
    fake_server.routes["GET", "/v1/jobs/x"] = lambda _: httpx.Response(418, text="<html>")
    with fake_server.client() as client, pytest.raises(ApiError) as caught:
        client.job("x")
    assert caught.value.status == 418
    assert caught.value.code == "http_error"
    assert "/v1/jobs/x" in str(caught.value)


def test_another_program_is_not_taken_for_a_server(fake_server: Any) -> None:
    fake_server.routes["GET", "/v1/jobs/x"] = lambda _: httpx.Response(200, text="<html>")
    with fake_server.client() as client, pytest.raises(ProtocolError, match="JobView"):
        client.job("x")


def test_connection_refused_says_probe_up(fake_server: Any) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("Connection refused", request=request)

    fake_server.routes["GET", "/v1/jobs/x"] = refuse
    with fake_server.client() as client, pytest.raises(ServerUnavailableError, match="probe up"):
        client.job("x")
    assert len(fake_server.requests) == 1


def test_a_broken_submit_is_repeated_under_the_same_key(fake_server: Any, wire: Any) -> None:
    answers = [httpx.ReadTimeout("slow"), wire.problem(503, "busy", "later"), None]

    def submit(request: httpx.Request) -> httpx.Response:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer or httpx.Response(202, json=wire.job("job_01new"))

    fake_server.routes["POST", "/v1/jobs"] = submit
    with fake_server.client(retries=2) as client:
        assert client.submit(wire.spec).id == "job_01new"
    assert len({r.headers["idempotency-key"] for r in fake_server.requests}) == 1
    assert len(fake_server.requests) == 3


def test_retry_after_is_obeyed_and_bounded(fake_server: Any, wire: Any) -> None:
    waits = ["7", "9999", "tomorrow"]

    def busy(request: httpx.Request) -> httpx.Response:
        if not waits:
            return httpx.Response(200, json=wire.job("x"))
        answer = wire.problem(429, "busy", "later")
        answer.headers["retry-after"] = waits.pop(0)
        return answer

    fake_server.routes["GET", "/v1/jobs/x"] = busy
    with fake_server.client(retries=3) as client:
        client.job("x")
    assert fake_server.pauses[:2] == [7.0, 30.0]
    assert 0 < fake_server.pauses[2] < 5


def test_a_limited_call_waits_for_as_long_as_its_time_allows(fake_server: Any, wire: Any) -> None:
    """429 means that nothing was done: also what is sent once only is sent again."""
    left = [3]

    def limited(request: httpx.Request) -> httpx.Response:
        left[0] -= 1
        if left[0] < 0:
            return httpx.Response(200, json=wire.job("x"))
        answer = wire.problem(429, "rate_limited", "later")
        answer.headers["retry-after"] = "4"
        return answer

    fake_server.routes["POST", "/v1/jobs/x/cancel"] = limited
    with fake_server.client(retries=0, timeout_s=12) as client:
        assert client.cancel("x").id == "x"
    assert fake_server.pauses == [4.0, 4.0, 4.0]
    left[0] = 100
    with fake_server.client(retries=0, timeout_s=12) as client, pytest.raises(OverloadedError):
        client.cancel("x")
    assert len(fake_server.requests) == 4 + 4  # at 0, 4, 8 and 12 s


def test_bad_input_is_not_repeated(fake_server: Any, wire: Any) -> None:
    fake_server.routes["POST", "/v1/jobs"] = lambda _: wire.problem(422, "config_error", "no")
    with fake_server.client() as client, pytest.raises(BadInputError):
        client.submit(wire.spec)
    assert len(fake_server.requests) == 1


def test_filters_and_pages(fake_server: Any, wire: Any) -> None:
    jobs = [wire.job(f"job_{i}") for i in range(5)]

    def page(request: httpx.Request) -> httpx.Response:
        after = request.url.params.get("after")
        start = 0 if after is None else [j["id"] for j in jobs].index(after) + 1
        return httpx.Response(
            200, json={"data": jobs[start : start + 2], "has_more": start + 2 < len(jobs)}
        )

    fake_server.routes["GET", "/v1/jobs"] = page
    with fake_server.client() as client:
        found = list(client.iter_jobs(status="running", labels={"a": "1", "b": "x=y"}))
    assert [job.id for job in found] == [job["id"] for job in jobs]
    first = fake_server.requests[0].url.params
    assert first.get_list("label") == ["a=1", "b=x=y"]
    assert first["status"] == "running"


def test_an_id_cannot_leave_its_place_in_the_path(fake_server: Any) -> None:
    with fake_server.client() as client:
        for job_id in ("../workers", "a/b?c", ""):
            with pytest.raises(NotFoundError):
                client.job(job_id)
    paths = [r.url.raw_path.decode() for r in fake_server.requests]
    assert paths == ["/v1/jobs/..%2Fworkers", "/v1/jobs/a%2Fb%3Fc", "/v1/jobs/%20"]


def series(wire: Any) -> list[dict[str, Any]]:
    return [
        wire.event(1, "job.queued"),
        wire.event(2, "job.running"),
        wire.event(3, "unit.started", unit_id="0000-step-0", index=0),
        wire.event(4, "unit.finished", unit_id="0000-step-0", index=0),
        wire.event(5, "job.succeeded"),
    ]


def test_events_are_whole_and_single_over_broken_connections(fake_server: Any, wire: Any) -> None:
    """The stream breaks after every event, once within one, once before its headers."""
    events = series(wire)
    cuts = iter(["whole", "half", "refused", "whole", "repeat", "whole", "whole", "whole"])

    def stream(request: httpx.Request) -> httpx.Response:
        after = int(request.headers.get("last-event-id", 0))
        rest = [e for e in events if e["id"] > after]
        how = next(cuts)
        if how == "refused":
            raise httpx.ConnectError("refused", request=request)
        if how == "repeat":  # a server that sends an event again must not make us yield it twice
            rest = events[:after]
        text = wire.stream(rest[:1] if how != "repeat" else rest)
        return httpx.Response(200, text=text[:-8] if how == "half" else text)

    fake_server.jobs = [wire.job("x", "running")]
    fake_server.routes["GET", "/v1/jobs/x/events"] = stream
    with fake_server.client() as client:
        seen = list(client.events("x"))
    assert [e.id for e in seen] == [1, 2, 3, 4, 5]
    asked = [r.headers.get("last-event-id") for r in fake_server.requests if "events" in str(r.url)]
    assert asked[0] is None
    assert asked[-1] == "4"


def test_events_after_a_known_one(fake_server: Any, wire: Any) -> None:
    fake_server.jobs, fake_server.events = [wire.job("x", "succeeded")], series(wire)
    with fake_server.client() as client:
        assert [e.id for e in client.events("x", after=3)] == [4, 5]
        assert list(client.events("x", after=5)) == []


def test_an_event_type_of_a_newer_server_is_passed_over(fake_server: Any, wire: Any) -> None:
    events = [wire.event(1, "unit.admired"), wire.event(2, "job.cancelled")]
    fake_server.jobs, fake_server.events = [wire.job("x", "cancelled")], events
    with fake_server.client() as client:
        assert [e.type for e in client.events("x")] == ["job.cancelled"]


def test_events_give_up_on_a_server_that_stays_away(fake_server: Any) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    fake_server.routes["GET", "/v1/jobs/x/events"] = refuse
    with fake_server.client(reconnect_s=10) as client, pytest.raises(ServerUnavailableError):
        list(client.events("x"))
    assert 10 < sum(fake_server.pauses) < 20


def test_events_of_an_unknown_job(fake_server: Any) -> None:
    with fake_server.client() as client, pytest.raises(NotFoundError):
        next(client.events("nope"))


def test_wait_polls_until_the_end_and_survives_a_restart(fake_server: Any, wire: Any) -> None:
    states = ["queued", "gone", "running", "gone", "succeeded"]

    def show(request: httpx.Request) -> httpx.Response:
        state = states.pop(0)
        if state == "gone":
            raise httpx.ConnectError("refused", request=request)
        return httpx.Response(200, json=wire.job("x", state))

    fake_server.routes["GET", "/v1/jobs/x"] = show
    with fake_server.client() as client:
        assert client.wait("x").status == "succeeded"
    assert states == []


def test_wait_ends_in_time(fake_server: Any, wire: Any) -> None:
    fake_server.jobs = [wire.job("x", "running")]
    with fake_server.client() as client, pytest.raises(WaitTimeoutError, match="still running"):
        client.wait("x", timeout_s=30)
    assert 25 < sum(fake_server.pauses) <= 30


def test_wait_can_raise_for_a_failed_job(fake_server: Any, wire: Any) -> None:
    error = {"code": "checkpoint_error", "message": "no such file", "unit_id": "0001-step-5"}
    fake_server.jobs = [wire.job("x", "failed", error=error)]
    with fake_server.client() as client:
        assert client.wait("x").status == "failed"
        with pytest.raises(JobFailedError, match="checkpoint_error: no such file"):
            client.wait("x", check=True)


def test_every_call_has_a_time_out(fake_server: Any, wire: Any) -> None:
    fake_server.jobs, fake_server.events = [wire.job("x", "cancelled")], series(wire)
    with fake_server.client() as client:
        client.job("x")
        client.submit(wire.spec)
        client.cancel("x")
        list(client.events("x"))
        client.ready()
    for request in fake_server.requests:
        limits = request.extensions["timeout"]
        assert all(limits[k] for k in ("connect", "read", "write", "pool")), request.url


def test_files_are_asked_for_by_accept(fake_server: Any, wire: Any) -> None:
    fake_server.routes["GET", "/v1/jobs/x/results"] = lambda r: httpx.Response(
        200, text=r.headers["accept"]
    )
    fake_server.routes["GET", "/v1/jobs/x/chart"] = lambda r: httpx.Response(
        200, text=r.headers["accept"]
    )
    with fake_server.client() as client:
        assert client.results_file("x", "csv") == b"text/csv"
        assert client.chart("x", "png") == b"image/png"
