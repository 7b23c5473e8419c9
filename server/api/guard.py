"""Who may ask what, and how much: Host and Origin checks, API keys and their scopes, limits.

A pure ASGI layer around the app, so that it also covers pages, static files and unknown paths,
and so that event streams pass through it unbuffered. It also sets the headers of every answer.
"""

import ipaddress
import time
from collections import OrderedDict
from functools import partial
from urllib.parse import urlsplit

from anyio import to_thread
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from probe.errors import ConfigError
from server.api.callers import (
    ANYONE,
    Caller,
    Credentials,
    Keyring,
    caller_of,
    credentials_of,
    remember_caller,
)
from server.api.limits import Buckets, Slots, network_of, retry_after
from server.api.problems import ProblemError, database_problem
from server.api.revocation import stream_while
from server.keys import KeyScope
from server.settings import Settings

# Answered whatever else is going on: what asks them restarts the server when they fail.
_HEALTH_PATHS = frozenset({"/healthz", "/readyz"})
# Reachable without a key too: the login page and what it needs, the API's description.
_OPEN_PATHS = frozenset({"/login", "/docs", "/openapi.json"})
ADMIN_PATHS = frozenset({"/v1/jobs:import"})
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_SHORTEST_KEY = 16  # characters of a key from the environment, where strangers can try
_MAX_TARGET_BYTES = 8192
_MAX_HEADER_BYTES = 32_768
# Of wrong keys, per address: enough for typing errors and stale cookies, nothing for guessing.
_WRONG_PER_S, _WRONG_BURST = 0.2, 20
_KNOWN_S, _MOST_KNOWN = 600.0, 10_000
_RECHECK_S = 5.0  # how often an open stream's key is looked at again
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
]


def check_exposure(settings: Settings, *, has_keys: bool) -> None:
    """Refuse settings that would let strangers in.

    Args:
        settings: Address and roots.
        has_keys: Whether there is any API key, in the environment or the database.

    Raises:
        ConfigError: A non-loopback host without API keys, with one that can be guessed, or
            without roots.
    """
    if _is_loopback(settings.host):
        return
    ways = {
        "make a key with `probe keys create`, or set PROBE_API_KEYS": has_keys,
        "set PROBE_ROOTS": bool(settings.roots),
        f"give every key of PROBE_API_KEYS at least {_SHORTEST_KEY} characters": all(
            len(key.get_secret_value()) >= _SHORTEST_KEY for key in settings.api_keys
        ),
    }
    for way, is_done in ways.items():
        if not is_done:
            raise ConfigError(
                f"host {settings.host} can be reached from other machines: {way}; "
                "or listen on 127.0.0.1"
            )


class Gate:
    """Finds out who asks, and counts. One per app; every method belongs to its event loop."""

    def __init__(self, settings: Settings, keyring: Keyring) -> None:
        """Nobody has asked yet."""
        self._keyring = keyring
        self._requests = Buckets(settings.rate_limit_per_s, settings.rate_limit_burst)
        self._wrong = Buckets(_WRONG_PER_S, _WRONG_BURST)
        self._known: OrderedDict[bytes, float] = OrderedDict()
        self.streams = Slots(settings.max_event_streams)

    async def keys_are_asked_for(self) -> bool:
        """Whether requests need a key now."""
        known = self._keyring.are_asked_for()
        return await to_thread.run_sync(self._keyring.look) if known is None else known

    async def identify(self, credentials: Credentials, address: str) -> Caller | None:
        """Whose credentials these are; None where nobody's.

        Raises:
            ProblemError: 429 after too many wrong ones from the address. Credentials that were
                right a while ago are looked at all the same: others may share the address.
        """
        wait_s = self._wrong.wait_s(address)
        if wait_s > 0 and not self._was_right(credentials):
            raise _limited(wait_s, "wrong API keys from this address")
        if self._keyring.needs_query(credentials):
            caller = await to_thread.run_sync(self._keyring.check, credentials)
        else:
            caller = self._keyring.check(credentials)
        if caller is None:
            self._wrong.take(address)
            self._known.pop(credentials.digest, None)
            return None
        self._known[credentials.digest] = time.monotonic()
        self._known.move_to_end(credentials.digest)
        if len(self._known) > _MOST_KNOWN:
            self._known.popitem(last=False)
        return caller

    async def still_opens(self, credentials: Credentials) -> bool:
        """Whether credentials that were let in would be again; yes where that cannot be asked."""
        try:
            if self._keyring.needs_query(credentials):
                return await to_thread.run_sync(self._keyring.check, credentials) is not None
            return self._keyring.check(credentials) is not None
        except SQLAlchemyError:
            return True  # an outage of the database ends no stream

    def count(self, caller: str) -> None:
        """Count one request.

        Raises:
            ProblemError: 429, too many.
        """
        wait_s = self._requests.take(caller)
        if wait_s > 0:
            raise _limited(wait_s, "requests")

    def _was_right(self, credentials: Credentials) -> bool:
        then = self._known.get(credentials.digest)
        return then is not None and time.monotonic() - then < _KNOWN_S


class Guard:
    """Lets a request through, or answers it with a problem."""

    def __init__(self, app: ASGIApp, settings: Settings, gate: Gate, keyring: Keyring) -> None:
        """Wrap `app`."""
        self.app = app
        self._gate = gate
        self._keyring = keyring
        self._hosts = {"localhost", "127.0.0.1", "::1", settings.host.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, then pass on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                present = {name.lower() for name, _value in headers}
                headers += [header for header in _HEADERS if header[0] not in present]
                message = {**message, "headers": headers}
            await send(message)

        try:
            caller = await self._let_in(scope)
        except ProblemError as refusal:
            await refusal.response()(scope, receive, send_with_headers)
        except SQLAlchemyError as error:  # who asks cannot be found out
            await database_problem(error).response()(scope, receive, send_with_headers)
        else:
            await self._pass_on(caller, scope, receive, send_with_headers)

    async def _pass_on(self, caller: str, scope: Scope, receive: Receive, send: Send) -> None:
        if not _is_event_stream(scope):
            await self.app(scope, receive, send)
            return
        if not self._gate.streams.take(caller):
            refusal = ProblemError(
                429,
                "too_many_streams",
                "too many event streams are open with this key or from this address; close some",
                headers={"Retry-After": "5"},
            )
            await refusal.response()(scope, receive, send)
            return
        try:
            await self._stream(scope, receive, send)
        finally:
            self._gate.streams.give_back(caller)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        credentials = credentials_of(Headers(scope=scope))
        if credentials is None or caller_of(scope) is ANYONE:
            await self.app(scope, receive, send)
            return
        still_opens = partial(self._gate.still_opens, credentials)
        await stream_while(still_opens, self.app, scope, receive, send, every_s=_RECHECK_S)

    async def _let_in(self, scope: Scope) -> str:
        """Whom the request counts for.

        Raises:
            ProblemError: It is not let in.
        """
        _check_target(scope)
        headers = Headers(scope=scope)
        path: str = scope["path"]
        client = scope.get("client")
        address = network_of(client[0] if client else "")
        is_health = path in _HEALTH_PATHS
        is_locked = (
            self._keyring.may_be_asked_for()
            if is_health  # which asks no database
            else await self._gate.keys_are_asked_for()
        )
        self._check_source(scope, headers, is_locked)
        remember_caller(scope, ANYONE)
        if is_health:
            return address
        if not is_locked or path in _OPEN_PATHS or path.startswith("/static/"):
            self._gate.count(address)
            return address
        return await self._identified(scope, headers, address)

    async def _identified(self, scope: Scope, headers: Headers, address: str) -> str:
        credentials = credentials_of(headers)
        caller = None if credentials is None else await self._gate.identify(credentials, address)
        if caller is None:
            self._gate.count(address)
            raise _unauthorized(scope, headers)
        counted = f"key {caller.name}"
        self._gate.count(counted)
        require(caller, _needed_scope(scope))
        remember_caller(scope, caller)
        return counted

    def _check_source(self, scope: Scope, headers: Headers, is_locked: bool) -> None:
        host = headers.get("host", "")
        # Without keys, a page anywhere on the web could reach us through a name of its own
        # that resolves to 127.0.0.1; its Host header gives it away.
        if not is_locked and _host_name(host) not in self._hosts:
            raise ProblemError(
                403, "host_not_allowed", f"this server does not answer for host {host[:200]!r}"
            )
        if scope["method"] not in _SAFE_METHODS and _is_foreign(headers, host):
            raise ProblemError(
                403, "cross_origin", "requests from other web sites' pages are refused"
            )


def require(caller: Caller, scope: KeyScope, what: str = "this") -> None:
    """Refuse a caller whose key may not do something.

    Raises:
        ProblemError: 403 `scope_missing`, naming the scope needed.
    """
    if not caller.may(scope):
        raise ProblemError(
            403,
            "scope_missing",
            f"{what} needs a key of scope {scope}; the key {caller.name!r} has scope "
            f"{caller.scope}",
        )


def _needed_scope(scope: Scope) -> KeyScope:
    if scope["method"] in _SAFE_METHODS:
        return "read"
    return "admin" if scope["path"] in ADMIN_PATHS else "submit"


def _check_target(scope: Scope) -> None:
    # A route's pattern ends before a line break at the end of the path, a comparison here does
    # not; and such a path would end up in logs.
    if not scope["path"].isprintable():
        raise ProblemError(404, "not_found", f"there is nothing at {scope['path'][:200]!a}")
    target = len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"])
    if target > _MAX_TARGET_BYTES:
        raise ProblemError(
            414, "uri_too_long", f"an address holds at most {_MAX_TARGET_BYTES:,} bytes"
        )
    if sum(len(name) + len(value) for name, value in scope["headers"]) > _MAX_HEADER_BYTES:
        raise ProblemError(
            431, "headers_too_large", f"headers hold at most {_MAX_HEADER_BYTES:,} bytes"
        )


def _is_event_stream(scope: Scope) -> bool:
    path: str = scope["path"]
    return path.startswith("/v1/jobs/") and path.endswith("/events")


def _limited(wait_s: float, what: str) -> ProblemError:
    return ProblemError(
        429,
        "rate_limited",
        f"too many {what}; try again after {retry_after(wait_s)} s",
        headers={"Retry-After": retry_after(wait_s)},
    )


def _unauthorized(scope: Scope, headers: Headers) -> ProblemError:
    if scope["method"] in _SAFE_METHODS and "text/html" in headers.get("accept", ""):
        return ProblemError(303, "unauthorized", "log in first", headers={"Location": "/login"})
    return ProblemError(
        401,
        "unauthorized",
        "send an API key as bearer token in the header Authorization",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _is_foreign(headers: Headers, host: str) -> bool:
    """Whether a browser says that another site's page made this request."""
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return True
    origin = headers.get("origin")
    if origin is None:
        return False
    try:
        return urlsplit(origin).netloc.lower() != host.lower()
    except ValueError:
        return True


def _host_name(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
