"""Routes for those who run the server: health, metrics, workers."""

from collections.abc import Iterable

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily
from pydantic import BaseModel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.context import StoreDep, known_query
from server.api.problems import responses
from server.store import Store
from server.wire import WorkerList

router = APIRouter(dependencies=[Depends(known_query)], tags=["operations"])


class Health(BaseModel):
    """The server answers."""

    status: str = "ok"


@router.get("/healthz", response_model=Health, responses=responses(422))
async def health() -> Health:
    """Whether the process answers at all; says nothing of the database."""
    return Health()


@router.get("/readyz", response_model=Health, responses=responses(422, 503))
def readiness(store: StoreDep) -> Health:
    """Whether jobs can be taken: the database answers."""
    store.ready()
    return Health()


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
    """Jobs by state, workers alive, HTTP requests; for Prometheus."""
    return Response(generate_latest(request.app.state.metrics), media_type=CONTENT_TYPE_LATEST)


class StoreCollector:
    """Reads the store when it is scraped, so that the numbers are those of the database."""

    def __init__(self, store: Store) -> None:
        """Collect from `store`."""
        self._store = store

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Nothing: registering must not read the database."""
        return ()

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """The metrics, read now."""
        jobs = GaugeMetricFamily("probe_jobs", "Jobs by state", labels=["status"])
        for status, number in self._store.count_jobs().items():
            jobs.add_metric([status], number)
        yield jobs
        alive = sum(worker.alive for worker in self._store.list_workers())
        yield GaugeMetricFamily("probe_workers_alive", "Workers with a fresh heartbeat", alive)


class CountRequests:
    """Counts answers by method, route and status."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        """Wrap `app`; the counter goes to `registry`."""
        self.app = app
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

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                # The route's pattern, never the path: ids would make endless series.
                route = getattr(scope.get("route"), "path", "(none)")
                method = scope["method"] if scope["method"] in _METHODS else "(other)"
                self._requests.labels(method, route, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counting_send)


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
