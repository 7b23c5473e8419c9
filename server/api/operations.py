"""Routes for those who run the server: health, metrics, workers."""

import time

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
)
from pydantic import BaseModel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import tracing
from server.api.context import StoreDep, known_query
from server.api.problems import responses, with_members
from server.errors import StoreNotReadyError
from server.wire import Readiness, WorkerList

router = APIRouter(dependencies=[Depends(known_query)], tags=["operations"])


class Health(BaseModel):
    """The server answers."""

    status: str = "ok"


@router.get("/healthz", response_model=Health, responses=responses(422))
async def health() -> Health:
    """Whether the process answers at all; says nothing of the database."""
    return Health()


@router.get("/readyz", response_model=Readiness, responses=responses(422, 503))
def readiness(store: StoreDep) -> Readiness | Response:
    """Whether jobs can be taken: the database answers, with the tables this program needs.

    The problem of a 503 has the members `database` and `migrations` too, where they are known.
    """
    try:
        return store.ready()
    except StoreNotReadyError as error:
        if error.state is None:
            raise
        return with_members(error, error.state.model_dump(mode="json", exclude={"status"}))


@router.get("/v1/workers", response_model=WorkerList, responses=responses(422, 503))
def list_workers(store: StoreDep) -> WorkerList:
    """Worker processes that have reported to this server's database."""
    return WorkerList(data=store.list_workers())


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"description": "Prometheus text", "content": {"text/plain": {}}},
        **responses(422, 503),
    },
)
def metrics(request: Request) -> Response:
    """Jobs, units, failures, workers, GPU memory, requests; for Prometheus."""
    return Response(generate_latest(request.app.state.metrics), media_type=CONTENT_TYPE_LATEST)


class CountRequests:
    """Counts answers by method, route and status, times them to their beginning, traces them."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        """Wrap `app`; the metrics go to `registry`."""
        self.app = app
        self._seconds = Histogram(
            "probe_http_request_seconds",
            "From a request's arrival to the beginning of its answer; a stream goes on after that",
            ["method", "route"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._requests = Counter(
            "probe_http_requests",
            "HTTP requests answered",
            ["method", "route", "status"],
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and count when the answer begins."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        if tracing.is_on() and scope["path"] not in _UNTRACED:
            parent = tracing.traceparent_of(dict(scope["headers"]))
            with tracing.span("request", parent=parent, server=True) as span:
                await self._observed(scope, receive, send, span)
        else:
            await self._observed(scope, receive, send, None)

    async def _observed(
        self, scope: Scope, receive: Receive, send: Send, span: tracing.Span | None
    ) -> None:
        begin = time.perf_counter()

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                # The route's pattern, never the path: ids would make endless series.
                route = getattr(scope.get("route"), "path", "(none)")
                method = scope["method"] if scope["method"] in _METHODS else "(other)"
                self._requests.labels(method, route, str(message["status"])).inc()
                self._seconds.labels(method, route).observe(time.perf_counter() - begin)
                if span is not None:
                    span.answered(method, route, message["status"])
            await send(message)

        await self.app(scope, receive, counting_send)


_UNTRACED = frozenset({"/healthz", "/readyz", "/metrics"})  # asked every few seconds, for ever
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
