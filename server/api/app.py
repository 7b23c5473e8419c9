"""Put the HTTP server together: guard, routes, errors, metrics, dashboard."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from probe import __version__
from server.api import events, jobs, operations, pages, problems, results
from server.api.guard import Guard, check_exposure
from server.api.openapi import describe
from server.settings import Settings
from server.store import SqlStore, Store

log = logging.getLogger(__name__)


def create_app(
    settings: Settings,
    store: Store | None = None,
    *,
    heartbeat_s: float = 15.0,
    event_poll_s: float = 0.25,
) -> FastAPI:
    """The ASGI app.

    Args:
        settings: Address, roots, keys, database.
        store: None: a `SqlStore` on `settings.database_url`, opened here and closed at shutdown.
        heartbeat_s: Longest silence of an event stream.
        event_poll_s: How often an event stream looks for news; slower while there is none.

    Raises:
        ConfigError: The settings would let strangers in.
    """
    check_exposure(settings)
    own = None if store is not None else _open_store(settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        if own is not None:
            own.close()

    app = FastAPI(
        title="Sharpness Probe",
        version=__version__,
        description="Critical sharpness of language models, from forward passes only.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.settings = settings
    app.state.store = store or own
    app.state.heartbeat_s = heartbeat_s
    app.state.event_poll_s = event_poll_s
    app.state.metrics = CollectorRegistry()
    app.state.metrics.register(operations.StoreCollector(app.state.store))
    for module in (jobs, events, results, operations, pages):
        app.include_router(module.router)
    problems.install(app)
    app.add_middleware(Guard, settings=settings)
    app.add_middleware(operations.CountRequests, registry=app.state.metrics)
    _describe(app, needs_key=bool(settings.api_keys))
    return app


def _open_store(settings: Settings) -> SqlStore:
    return SqlStore(settings.database_url, worker_stale_s=settings.worker_stale_s)


def _describe(app: FastAPI, *, needs_key: bool) -> None:
    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = describe(app, needs_key=needs_key)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way
