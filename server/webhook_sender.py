"""Sends what `server.webhooks` has queued: at least once each, signed, to checked addresses only.

Runs in the HTTP server's event loop. A delivery is claimed by moving its next attempt behind a
lease on the database's clock, so that several servers share the work and what a killed one held
is taken up by another. Every attempt of a delivery carries the same id.
"""

import asyncio
import contextlib
import logging
import random
import ssl
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from server import tables
from server.settings import Settings
from server.tables import webhook_deliveries
from server.webhooks import (
    DELIVERY,
    SIGNATURE,
    fault_of_address,
    fault_of_webhook,
    listing_of,
    signature,
)

log = logging.getLogger(__name__)

_TIMEOUT_S = 10.0  # of a whole attempt
_LEASE_MS = 60_000  # a server that holds a claim for longer is taken for dead
_POLL_S = 1.0
_MOST_AT_ONCE = 8
_FIRST_DELAY_MS, _LONGEST_DELAY_MS = 10_000, 3_600_000
_GIVE_UP_MS = 86_400_000
_GONE = 410


@dataclass(frozen=True, slots=True)
class _Delivery:
    id: str
    job_id: str
    url: str
    body: str
    created_at: int
    num_attempts: int


class DeliveryError(Exception):
    """Why an attempt failed, in words that hold no address and no secret."""

    def __init__(self, reason: str, *, is_final: bool = False) -> None:
        """Keep the reason; `is_final` says that no other attempt is to be made."""
        super().__init__(reason)
        self.is_final = is_final


class WebhookSender:
    """Delivers until it is cancelled."""

    def __init__(self, engine: sa.Engine, settings: Settings, *, poll_s: float = _POLL_S) -> None:
        """Nothing is sent yet.

        Args:
            engine: Of the database with the deliveries.
            settings: `webhook_secret`, without which nothing is sent, and `webhook_hosts`.
            poll_s: How often a database without anything due is looked at.
        """
        self._engine = engine
        self._settings = settings
        self._poll_s = poll_s
        self._now = tables.now_ms(engine)
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Deliver what is due, for ever; returns at once where nothing can be signed."""
        if self._settings.webhook_secret is None:
            return
        try:
            while True:
                delivery = None
                if len(self._tasks) < _MOST_AT_ONCE:
                    try:
                        delivery = await asyncio.to_thread(self._claim)
                    except SQLAlchemyError:
                        log.warning("webhooks wait: the database does not answer")
                if delivery is None:
                    # Servers that share a database should not ask it in step.
                    await asyncio.sleep(self._poll_s * random.uniform(0.8, 1.2))
                    continue
                task = asyncio.create_task(self._deliver(delivery))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _deliver(self, delivery: _Delivery) -> None:
        error: DeliveryError | None = None
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await self._attempt(delivery)
        except TimeoutError:
            error = DeliveryError(f"no answer within {_TIMEOUT_S:g} s")
        except DeliveryError as raised:
            error = raised
        about = {"event": "webhook", "job_id": delivery.job_id, "delivery": delivery.id}
        if error is not None:
            log.warning(
                "webhook of %s, try %d: %s",
                *(delivery.job_id, delivery.num_attempts, error),
                extra=about,
            )
        else:
            log.info("webhook of %s is delivered", delivery.job_id, extra=about)
        with contextlib.suppress(SQLAlchemyError):  # then it is sent again: at least once
            await asyncio.to_thread(self._note, delivery, error)

    async def _attempt(self, delivery: _Delivery) -> None:
        """Send once.

        Raises:
            DeliveryError: It was not accepted, or must not be sent.
        """
        import httpx

        address = await self._address(delivery.url)
        parts = urlsplit(delivery.url)
        host = f"[{address}]" if ":" in address else address
        target = urlunsplit(parts._replace(netloc=f"{host}:{parts.port}" if parts.port else host))
        try:
            async with (
                httpx.AsyncClient(
                    trust_env=False, timeout=_TIMEOUT_S, verify=self._tls, follow_redirects=False
                ) as client,
                client.stream(
                    "POST",
                    target,
                    content=delivery.body.encode(),
                    headers=self._headers(delivery, parts.netloc),
                    # The certificate must be the name's, not the address's.
                    extensions={"sni_hostname": parts.hostname},
                ) as response,
            ):
                status = response.status_code  # the body is nobody's business: left unread
        except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError, OSError) as error:
            raise DeliveryError(f"{type(error).__name__} on the way to the host") from error
        if not 200 <= status < 300:
            raise DeliveryError(f"the host answered {status}", is_final=status == _GONE)

    def _headers(self, delivery: _Delivery, netloc: str) -> dict[str, str]:
        secret = self._settings.webhook_secret
        assert secret is not None
        return {
            "Host": netloc,
            "Content-Type": "application/json",
            "User-Agent": "sharpness-probe",
            DELIVERY: delivery.id,
            SIGNATURE: signature(secret.get_secret_value(), int(time.time()), delivery.body),
        }

    async def _address(self, url: str) -> str:
        """The checked address to connect to: asked for once, so that it cannot change after.

        Raises:
            DeliveryError: The host is not allowed (any more), or resolves to what is not.
        """
        hosts = self._settings.webhook_hosts
        fault = fault_of_webhook(url, hosts, has_secret=True)
        if fault is not None:
            raise DeliveryError("its host is not allowed any more")
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        listing = listing_of(host, port, parts.scheme, hosts)
        assert listing is not None
        try:
            answers = await self._resolve(host, port)
        except (OSError, UnicodeError) as error:  # the latter for a part of more than 63 letters
            raise DeliveryError("its host has no address") from error
        for address in answers:
            fault = fault_of_address(address, host, listing)
            if fault is not None:
                raise DeliveryError(fault)
        return answers[0]

    async def _resolve(self, host: str, port: int) -> list[str]:
        import socket

        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # IPv4 first: where IPv6 leads nowhere it is still listed.
        found.sort(key=lambda answer: answer[0] != socket.AF_INET)
        return [str(answer[4][0]) for answer in found]

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    # --- the database, in threads

    def _claim(self) -> _Delivery | None:
        """The delivery that is due for longest, now this server's until the lease is over."""
        d = webhook_deliveries.c
        due = (
            sa.select(d.id, d.next_attempt_at)
            .where(d.next_attempt_at <= self._now)
            .order_by(d.next_attempt_at)
            .limit(1)
        )
        with self._engine.connect() as connection:  # reads only: SQLite's writers are not held up
            row = connection.execute(due).first()
        if row is None:
            return None
        columns = (d.id, d.job_id, d.url, d.body, d.created_at, d.num_attempts)
        with self._engine.begin() as connection:
            claimed = connection.execute(
                sa.update(webhook_deliveries)
                .where(d.id == row.id, d.next_attempt_at == row.next_attempt_at)
                .values(next_attempt_at=self._now + _LEASE_MS, num_attempts=d.num_attempts + 1)
                .returning(*columns)
            ).first()
        return None if claimed is None else _Delivery(**claimed._mapping)

    def _note(self, delivery: _Delivery, error: DeliveryError | None) -> None:
        """Write down how an attempt ended, and when the next one is."""
        d = webhook_deliveries.c
        update = sa.update(webhook_deliveries).where(d.id == delivery.id)
        values: dict[str, Any]
        if error is None:
            values = {"delivered_at": self._now, "next_attempt_at": None, "last_error": None}
        else:
            # Another server's later attempt says more than this one.
            update = update.where(d.num_attempts == delivery.num_attempts, d.delivered_at.is_(None))
            due = self._now + delay_ms(delivery.num_attempts)
            is_over = due > delivery.created_at + _GIVE_UP_MS
            next_attempt = None if error.is_final else sa.case((is_over, sa.null()), else_=due)
            values = {"next_attempt_at": next_attempt, "last_error": str(error)}
        with self._engine.begin() as connection:
            connection.execute(update.values(**values))


def delay_ms(num_attempts: int) -> int:
    """Wait after so many failed attempts: 10 s, 20 s, 40 s, ... up to an hour."""
    return int(min(_FIRST_DELAY_MS * 2 ** min(num_attempts - 1, 20), _LONGEST_DELAY_MS))
