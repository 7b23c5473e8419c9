"""Put the HTTP server together: guard, routes, errors, metrics, dashboard."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from sqlalchemy.exc import SQLAlchemyError

from probe import __version__
from server.api import events, jobs, operations, pages, problems, results, transfer
from server.api.callers import Keyring
from server.api.event_hub import EventHub
from server.api.guard import Gate, Guard, check_exposure
from server.api.openapi import describe
from server.keys import KeyTable, keys_of_database
from server.settings import Settings
from server.store import SqlStore, Store
from server.webhook_sender import WebhookSender

log = logging.getLogger(__name__)

_FILL_AT_ONCE, _FILL_PAUSE_S = 100, 0.1


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
        event_poll_s: How often all event streams together look for news.

    Raises:
        ConfigError: The settings would let strangers in.
    """
    check_exposure(settings, has_keys=_has_keys(settings, store))
    own = None if store is not None else _open_store(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with _sending_webhooks(app):
            filling = asyncio.create_task(_fill_ended_views(app.state.store))
            yield
            filling.cancel()
        if own is not None:
            own.close()

    app = FastAPI(
        title="Sharpness Probe",
        version=__version__,
        description="Critical sharpness of language models, from forward passes only.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # it would send clients to whatever Host they were tricked into
        lifespan=lifespan,
    )
    app.state.settings = settings
    app.state.store = store or own
    app.state.heartbeat_s = heartbeat_s
    app.state.event_hub = EventHub(app.state.store, event_poll_s)
    app.state.metrics = CollectorRegistry()
    for module in (jobs, events, results, transfer, operations, pages):
        app.include_router(module.router)
    problems.install(app)
    keyring = _add_guard(app)
    app.add_middleware(operations.CountRequests, registry=app.state.metrics)
    if isinstance(app.state.store, SqlStore):
        app.state.store.feed_metrics(app.state.metrics)
    _describe(app, keyring)
    return app


def _add_guard(app: FastAPI) -> Keyring:
    # A store that is none, as of who wants the description only, has no keys.
    engine = getattr(app.state.store, "engine", None)
    settings: Settings = app.state.settings
    keyring = Keyring(settings, None if engine is None else KeyTable(engine))
    keyring.look()
    app.state.gate = Gate(settings, keyring)
    app.add_middleware(Guard, settings=settings, gate=app.state.gate, keyring=keyring)
    return keyring


@asynccontextmanager
async def _sending_webhooks(app: FastAPI) -> AsyncIterator[None]:
    sender = WebhookSender(app.state.store.engine, app.state.settings)
    sending = asyncio.create_task(sender.run())
    try:
        yield
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def _fill_ended_views(store: Store) -> None:
    """After an upgrade there are none, or those of an older release: lists are slower till then."""
    done: str | None = None
    while isinstance(store, SqlStore):
        try:
            done = await asyncio.to_thread(store.fill_ended_views, done, _FILL_AT_ONCE)
        except SQLAlchemyError:
            log.exception("views of ended jobs not written, the next start of a server may succeed")
            return
        if done is None:
            return
        await asyncio.sleep(_FILL_PAUSE_S)


def _has_keys(settings: Settings, store: Store | None) -> bool:
    # Looked for before the store is opened: refused settings must leave no database behind.
    if settings.api_keys:
        return True
    engine = getattr(store, "engine", None)
    if engine is not None:
        return KeyTable(engine).any_exist()
    return store is None and keys_of_database(settings.database_url)


def _open_store(settings: Settings) -> SqlStore:
    return SqlStore(settings.database_url, worker_stale_s=settings.worker_stale_s)


def _describe(app: FastAPI, keyring: Keyring) -> None:
    described: dict[bool, dict[str, Any]] = {}

    def openapi() -> dict[str, Any]:
        needs_key = keyring.may_be_asked_for()  # the first key may be made at any time
        if needs_key not in described:
            described[needs_key] = describe(app, needs_key=needs_key)
        return described[needs_key]

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way
