"""Who may ask what: Host and Origin checks, API keys, and the headers every answer carries.

A pure ASGI layer around the app, so that it also covers pages, static files and unknown paths,
and so that event streams pass through it unbuffered.
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from probe.errors import ConfigError
from server.api.problems import ProblemError
from server.settings import Settings

COOKIE = "probe_session"
# Reachable without a key: liveness, the login page and what it needs, the API's description.
_OPEN_PATHS = frozenset({"/healthz", "/readyz", "/login", "/docs", "/openapi.json"})
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


def check_exposure(settings: Settings) -> None:
    """Refuse settings that would let strangers in.

    Raises:
        ConfigError: A non-loopback host without API keys, or without roots.
    """
    if _is_loopback(settings.host):
        return
    for name, value in (("PROBE_API_KEYS", settings.api_keys), ("PROBE_ROOTS", settings.roots)):
        if not value:
            raise ConfigError(
                f"host {settings.host} can be reached from other machines: set {name}, "
                "or listen on 127.0.0.1"
            )


def session_cookie(key: str) -> str:
    """What a browser keeps instead of the key: it opens nothing but this server's pages."""
    return hmac.new(key.encode(), b"sharpness-probe dashboard", hashlib.sha256).hexdigest()


class Guard:
    """Lets a request through, or answers it with a problem."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        """Wrap `app`."""
        self.app = app
        self._keys = [key.get_secret_value() for key in settings.api_keys]
        self._hosts = {"localhost", "127.0.0.1", "::1", settings.host.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, then pass on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope)
        answer = self.app if refusal is None else refusal.response()
        await answer(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> ProblemError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        # Without keys, a page anywhere on the web could reach us through a name of its own
        # that resolves to 127.0.0.1; its Host header gives it away.
        if not self._keys and _host_name(host) not in self._hosts:
            return ProblemError(
                403, "host_not_allowed", f"this server does not answer for host {host[:200]!r}"
            )
        if scope["method"] not in _SAFE_METHODS and _is_foreign(headers, host):
            return ProblemError(
                403, "cross_origin", "requests from other web sites' pages are refused"
            )
        path: str = scope["path"]
        if not self._keys or path in _OPEN_PATHS or path.startswith("/static/"):
            return None
        if self._has_key(headers):
            return None
        return _unauthorized(scope, headers)

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return _matches(token.strip(), self._keys)
        cookies: SimpleCookie = SimpleCookie()
        try:
            cookies.load(headers.get("cookie", ""))
        except CookieError:
            return False
        found = cookies.get(COOKIE)
        return found is not None and _matches(
            found.value, [session_cookie(key) for key in self._keys]
        )


def _unauthorized(scope: Scope, headers: Headers) -> ProblemError:
    if scope["method"] in _SAFE_METHODS and "text/html" in headers.get("accept", ""):
        return ProblemError(303, "unauthorized", "log in first", headers={"Location": "/login"})
    return ProblemError(
        401,
        "unauthorized",
        "send Authorization: Bearer <API key>",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _matches(token: str, valid: Sequence[str]) -> bool:
    # Every key is compared, in constant time each: the time taken tells nothing.
    return any([hmac.compare_digest(token.encode(), key.encode()) for key in valid])


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
