"""The Python client of a Sharpness Probe server: synchronous, typed, a time-out on every call.

    with ProbeClient("http://127.0.0.1:8765") as client:
        job = client.wait(client.submit(spec).id)
        results = client.results(job.id).data

Reading is repeated when the connection breaks; so is submitting, under one idempotency key,
so that a lost answer never makes a second job. Everything raised is a `clients.errors.ClientError`.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, Self

import httpx
from pydantic import BaseModel

from clients.answers import event_from, parse, problem_of, retry_after_s
from clients.errors import (
    JobFailedError,
    OverloadedError,
    ProtocolError,
    ServerUnavailableError,
    WaitTimeoutError,
    api_error_for,
)
from clients.outgoing import plain, quoted
from clients.sse import StreamState, parse_events, split_lines
from probe.result import Plan
from server.wire import (
    ARCHIVE_TYPE,
    TERMINAL,
    CheckpointList,
    Event,
    JobList,
    JobView,
    Problem,
    ResultList,
    WorkerList,
)

DEFAULT_SERVER = "http://127.0.0.1:8765"
_TERMINAL_EVENTS = frozenset(f"job.{status}" for status in TERMINAL)
_CHART_TYPES = {
    "vega": "application/vnd.vegalite+json",
    "svg": "image/svg+xml",
    "png": "image/png",
}
_RESULT_TYPES = {
    "json": "application/json",
    "csv": "text/csv",
    "parquet": "application/vnd.apache.parquet",
}
# The server sends a heartbeat at least every 15 s; a stream silent for three of them is dead.
_STREAM_SILENCE_S = 45.0
_IMPORT_S = 300.0  # everything is checked and written before the answer


class ProbeClient:
    """A connection to one server. Thread-safe as `httpx.Client` is; close it or use `with`."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        retries: int = 2,
        reconnect_s: float = 60.0,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is sent yet.

        Args:
            base_url: Address of the server; None: env `PROBE_SERVER`, else the local default.
            api_key: Bearer key; None: env `PROBE_API_KEY`, else none is sent.
            timeout_s: Limit for connecting, for each wait on the socket, and for all waits of a
                call that the server limits (429); > 0.
            retries: How often a call is repeated after a broken connection or a 429/502/503/504.
            reconnect_s: How long `events` and `wait` keep trying to reach a server that is gone.
            transport: For tests: `httpx.MockTransport` or an in-process application.
            sleep: Waits between tries; replaceable in tests.
            clock: Seconds, monotonic; replaceable in tests.
        """
        self.base_url = (base_url or os.environ.get("PROBE_SERVER") or DEFAULT_SERVER).rstrip("/")
        key = api_key or os.environ.get("PROBE_API_KEY")
        if key and not (key.isascii() and key.isprintable()):
            raise ProtocolError("the API key holds characters that no HTTP header can carry")
        self._timeout_s, self._retries, self._reconnect_s = timeout_s, retries, reconnect_s
        self._sleep, self._clock = sleep, clock
        try:
            self._http = httpx.Client(
                base_url=self.base_url,
                headers={"Authorization": f"Bearer {key}"} if key else None,
                timeout=timeout_s,
                transport=transport,
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise ProtocolError(f"{self.base_url!r} is not a server address: {error}") from error

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # Jobs

    def submit(
        self, spec: BaseModel | Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> JobView:
        """The queued job of a spec; the same key and spec again give the same job.

        Args:
            spec: A `probe.spec` model or plain values in its form.
            idempotency_key: None: a fresh one, so only this call's own retries are covered.

        Raises:
            BadInputError: The spec is wrong (`errors` names the fields), or the key was used
                with another spec.
        """
        key = idempotency_key or str(uuid.uuid4())
        if not key.isascii():  # httpx cannot even send it
            detail = f"Idempotency-Key {key!r}: use visible ASCII characters only"
            raise api_error_for(Problem(title="", status=422, detail=detail, code="bad_input"))
        answer = self._send(
            "POST", "/v1/jobs", json=plain(spec), headers={"Idempotency-Key": key}, repeat=True
        )
        return parse(JobView, answer)

    def plan(self, spec: BaseModel | Mapping[str, Any]) -> Plan:
        """Units, passes and memory the server expects for a spec; queues nothing."""
        return parse(Plan, self._send("POST", "/v1/jobs:plan", json=plain(spec), repeat=True))

    def jobs(
        self,
        *,
        status: str | None = None,
        kind: str | None = None,
        queue: str | None = None,
        labels: Mapping[str, str] | None = None,
        after: str | None = None,
        limit: int = 50,
    ) -> JobList:
        """One page of jobs, newest first; `after` is the id of the last job seen."""
        query: list[tuple[str, str | int | float | bool | None]] = [("limit", limit)]
        given = {"status": status, "kind": kind, "queue": queue, "after": after}
        for name, value in given.items():
            if value is not None:
                query.append((name, value))
        query += [("label", f"{name}={value}") for name, value in (labels or {}).items()]
        return parse(JobList, self._send("GET", "/v1/jobs", params=httpx.QueryParams(query)))

    def iter_jobs(
        self,
        *,
        status: str | None = None,
        kind: str | None = None,
        queue: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Iterator[JobView]:
        """Every matching job, newest first, page after page."""
        after: str | None = None
        while True:
            page = self.jobs(
                status=status, kind=kind, queue=queue, labels=labels, after=after, limit=100
            )
            yield from page.data
            if not page.has_more or not page.data:
                return
            after = page.data[-1].id

    def job(self, job_id: str) -> JobView:
        """One job as it stands now.

        Raises:
            NotFoundError: There is none with this id.
        """
        return parse(JobView, self._send("GET", f"/v1/jobs/{quoted(job_id)}"))

    def cancel(self, job_id: str) -> JobView:
        """The job after asking for its end; one that has ended already is left as it is."""
        path = f"/v1/jobs/{quoted(job_id)}/cancel"
        return parse(JobView, self._send("POST", path, repeat=True))

    def wait(
        self,
        job_id: str,
        *,
        timeout_s: float | None = None,
        poll_s: float = 2.0,
        check: bool = False,
    ) -> JobView:
        """The job once it has succeeded, failed or been cancelled.

        Args:
            job_id: The job.
            timeout_s: Give up after this long; None: wait as long as it takes.
            poll_s: Longest pause between two looks; the first ones come sooner.
            check: Raise where the job did not succeed.

        Raises:
            WaitTimeoutError: It was still going on; the job itself is not stopped.
            JobFailedError: `check` is set and it failed or was cancelled.
            ServerUnavailableError: The server was gone for longer than `reconnect_s`.
        """
        start = last_answer = self._clock()
        pause = min(0.1, poll_s)
        while True:
            job = None
            try:
                job = self.job(job_id)
                last_answer = self._clock()
            except (ServerUnavailableError, OverloadedError):
                if self._clock() - last_answer > self._reconnect_s:
                    raise
            if job is not None and job.status in TERMINAL:
                if check and job.status != "succeeded":
                    raise JobFailedError(job)
                return job
            if timeout_s is not None and self._clock() - start + pause > timeout_s:
                state = job.status if job else "of unknown state"
                raise WaitTimeoutError(f"job {job_id} is still {state} after {timeout_s:g} s")
            self._sleep(pause)
            pause = min(pause * 1.5, poll_s)

    def events(self, job_id: str, *, after: int = 0) -> Iterator[Event]:
        """What happens to a job, as it happens, until it ends; each event exactly once.

        A broken or silent connection is opened again with `Last-Event-ID`, so nothing is lost.

        Args:
            job_id: The job.
            after: Id of the last event already known; 0: from the job's beginning.

        Raises:
            NotFoundError: There is no such job.
            ServerUnavailableError: The server was gone for longer than `reconnect_s`.
        """
        state = StreamState(last_event_id=str(after) if after else "")
        seen, pause, last_contact = after, 0.1, self._clock()
        while True:
            try:
                for event in self._stream(job_id, state):
                    last_contact, pause = self._clock(), 0.1
                    if event.id <= seen:
                        continue
                    seen = event.id
                    yield event
                    if event.type in _TERMINAL_EVENTS:
                        return
                # The server ended the stream in order: either nothing more can come, or it stops.
                if self.job(job_id).status in TERMINAL and not self._has_news(job_id, seen):
                    return
            except (ServerUnavailableError, OverloadedError):
                if self._clock() - last_contact > self._reconnect_s:
                    raise
            self._sleep(state.retry_s if state.retry_s is not None else pause)
            pause = min(pause * 2, 5.0)

    # Results

    def results(self, job_id: str) -> ResultList:
        """Results of the units finished so far, in unit order; of a mix scan `scans` too."""
        return parse(ResultList, self._send("GET", f"/v1/jobs/{quoted(job_id)}/results"))

    def results_file(self, job_id: str, format: Literal["json", "csv", "parquet"]) -> bytes:
        """The results as the bytes of a file; csv and parquet in long form, a row per search."""
        path = f"/v1/jobs/{quoted(job_id)}/results"
        return self._send("GET", path, headers={"Accept": _RESULT_TYPES[format]}).content

    def chart(self, job_id: str, format: Literal["vega", "svg", "png"] = "svg") -> bytes:
        """The chart of lambda_c against step or ratio, by the job's kind: Vega-Lite, SVG or PNG."""
        path = f"/v1/jobs/{quoted(job_id)}/chart"
        return self._send("GET", path, headers={"Accept": _CHART_TYPES[format]}).content

    def job_plan(self, job_id: str) -> Plan:
        """What was planned when the job was submitted."""
        return parse(Plan, self._send("GET", f"/v1/jobs/{quoted(job_id)}/plan"))

    def event_log(self, job_id: str) -> bytes:
        """Every event so far, one JSON object a line; does not wait for more."""
        return self._send("GET", f"/v1/jobs/{quoted(job_id)}/event-log").content

    def import_archive(self, archive: bytes) -> tuple[JobView, bool]:
        """The job of an export made by `clients.transfer`; False: it was there already."""
        sent = {"headers": {"Content-Type": ARCHIVE_TYPE}, "content": archive}
        answer = self._send("POST", "/v1/jobs:import", repeat=True, timeout=_IMPORT_S, **sent)
        return parse(JobView, answer), answer.status_code == 201

    # The server

    def checkpoints(self, checkpoints: BaseModel | Mapping[str, Any]) -> CheckpointList:
        """The series that a `checkpoints:` section stands for, as the server sees it."""
        answer = self._send("POST", "/v1/checkpoints", json=plain(checkpoints), repeat=True)
        return parse(CheckpointList, answer)

    def workers(self) -> WorkerList:
        """Workers that have reported to this server's database."""
        return parse(WorkerList, self._send("GET", "/v1/workers"))

    def ready(self) -> bool:
        """Whether the server and its database answer; False also when nothing listens."""
        try:
            return self._http.get("/readyz").is_success
        except httpx.HTTPError:
            return False

    # Transport

    def _send(
        self, method: str, path: str, *, repeat: bool = False, **options: Any
    ) -> httpx.Response:
        """One call, repeated where that is safe: every GET, and what `repeat` says."""
        tries = 1 + (self._retries if repeat or method == "GET" else 0)
        for left in reversed(range(tries)):
            pause = 0.2 * 2.0 ** (tries - 1 - left)
            try:
                response = self._request_at_its_rate(method, path, **options)
            except httpx.ConnectError as error:  # nothing was sent; `wait` and `events` try on
                raise self._unavailable(error) from error
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise ProtocolError(
                    f"{self.base_url!r} is not a server address: {error}"
                ) from error
            except httpx.TransportError as error:
                if left == 0:
                    raise self._unavailable(error) from error
            else:
                if response.is_success:
                    return response
                problem = api_error_for(problem_of(response))
                if left == 0 or not problem.retryable:
                    raise problem
                pause = retry_after_s(response, otherwise=pause)
            self._sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _request_at_its_rate(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The answer; where it is 429 (nothing was done) asked again when the server says.

        For as long as the waits fit into `timeout_s`; then 429 is the answer.
        """
        begin = self._clock()
        while True:
            response = self._http.request(method, path, **options)
            pause = retry_after_s(response, otherwise=0.0)
            passed = self._clock() - begin
            if response.status_code != 429 or not pause or passed + pause > self._timeout_s:
                return response
            self._sleep(pause)

    def _stream(self, job_id: str, state: StreamState) -> Iterator[Event]:
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if state.last_event_id:
            headers["Last-Event-ID"] = state.last_event_id
        path = f"/v1/jobs/{quoted(job_id)}/events"
        timeout = httpx.Timeout(self._timeout_s, read=_STREAM_SILENCE_S)
        try:
            with self._http.stream("GET", path, headers=headers, timeout=timeout) as response:
                if not response.is_success:
                    response.read()
                    raise api_error_for(problem_of(response))
                for sent in parse_events(split_lines(response.iter_bytes()), state):
                    event = event_from(sent.data)
                    if event is not None:
                        yield event
        except httpx.TransportError as error:
            raise self._unavailable(error) from error

    def _has_news(self, job_id: str, seen: int) -> bool:
        """Whether an ended job has events after `seen`; it may have ended just now."""
        state = StreamState(last_event_id=str(seen) if seen else "")
        return any(event.id > seen for event in self._stream(job_id, state))

    def _unavailable(self, error: Exception) -> ServerUnavailableError:
        if isinstance(error, httpx.ConnectError):
            return ServerUnavailableError(
                f"no server at {self.base_url} ({error}); start one with `probe up`, "
                "or name another with --server or PROBE_SERVER"
            )
        reason = str(error) or type(error).__name__
        return ServerUnavailableError(f"the server at {self.base_url} broke off: {reason}")
