"""Who is asking: keys of the environment and of the database, each with what it may do.

Keys are asked for as soon as there is one, on a loopback address too. What the database says is
believed for `CACHE_S` seconds, so a revoked key opens nothing after that.
"""

import hashlib
import hmac
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie

from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import Headers
from starlette.types import Scope

from server.keys import (
    KEY_PATTERN,
    SCOPES,
    KeyScope,
    KeyTable,
    StoredKey,
    is_key_id,
    session_token,
)
from server.keys import token_sha256 as sha256_of_token
from server.settings import Settings

log = logging.getLogger(__name__)

COOKIE = "probe_session"
CACHE_S = 2.0
_MOST_CACHED = 10_000
_NOBODY_SHA256 = "0" * 64  # of no token: an unknown id costs the same comparison
_STATE = "probe.caller"


@dataclass(frozen=True, slots=True)
class Caller:
    """Someone whose request was let in."""

    name: str | None  # of the key; None where no key is asked for
    scope: KeyScope

    def may(self, scope: KeyScope) -> bool:
        """Whether this caller's scope holds the one named."""
        return SCOPES.index(self.scope) >= SCOPES.index(scope)


ANYONE = Caller(None, "admin")  # where no key is asked for


def caller_of(scope: Scope) -> Caller:
    """The caller that the guard let in with this request."""
    found: Caller = scope[_STATE]
    return found


def remember_caller(scope: Scope, caller: Caller) -> None:
    """Leave the caller where routes find it."""
    scope[_STATE] = caller


class Keyring:
    """Every key that is accepted now. Thread-safe; what asks the database is synchronous."""

    def __init__(
        self,
        settings: Settings,
        table: KeyTable | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is asked yet.

        Args:
            settings: `api_keys`, which are admin keys.
            table: Keys of the database; None: there is none.
            clock: Seconds, monotonic.
        """
        self._fixed = [of_key(key.get_secret_value()) for key in settings.api_keys]
        self._table = table
        self._clock = clock
        self._lock = threading.Lock()
        self._stored: OrderedDict[str, tuple[StoredKey | None, float]] = OrderedDict()
        self._any_stored = (False, float("-inf"))

    def are_asked_for(self) -> bool | None:
        """Whether requests need a key; None: the database has to be asked, by `look`."""
        any_stored, then = self._any_stored
        if self._fixed or self._table is None:
            return bool(self._fixed)
        # Once there was one it stays so: rows of keys are never removed.
        return any_stored if any_stored or self._clock() - then < CACHE_S else None

    def look(self) -> bool:
        """`are_asked_for`, from the database where need be."""
        known = self.are_asked_for()
        if known is None:
            assert self._table is not None
            known = self._table.any_exist()
            self._any_stored = (known, self._clock())
        return known

    def may_be_asked_for(self) -> bool:
        """`are_asked_for` as it was last known, without asking."""
        return bool(self._fixed) or self._any_stored[0]

    def check(self, credentials: "Credentials") -> Caller | None:
        """Whose credentials these are; None where nobody's.

        Cost: a query, unless the key was looked up within `CACHE_S`.
        """
        caller = self._fixed_key(credentials)
        if caller is not None or credentials.key_id is None:
            return caller
        stored = self._find(credentials.key_id)
        expected = _NOBODY_SHA256 if stored is None else stored.token_sha256
        is_equal = hmac.compare_digest(sha256_of_token(credentials.token), expected)
        if stored is None or not is_equal or stored.status != "active":
            return None
        return Caller(stored.name, stored.scope)

    def needs_query(self, credentials: "Credentials") -> bool:
        """Whether `check` would ask the database."""
        key_id = credentials.key_id
        if key_id is None or self._table is None:
            return False
        with self._lock:
            found = self._stored.get(key_id)
        return found is None or self._clock() - found[1] >= CACHE_S

    def _fixed_key(self, credentials: "Credentials") -> Caller | None:
        # Every key is compared, in constant time each: the time taken tells nothing.
        matches = [_equal(credentials, key) for key in self._fixed]
        if not any(matches):
            return None
        return Caller(f"PROBE_API_KEYS/{matches.index(True) + 1}", "admin")

    def _find(self, key_id: str) -> StoredKey | None:
        if self._table is None:
            return None
        now = self._clock()
        with self._lock:
            found = self._stored.get(key_id)
        if found is not None and now - found[1] < CACHE_S:
            return found[0]
        stored = self._table.find(key_id)
        with self._lock:
            self._stored[key_id] = (stored, now)
            self._stored.move_to_end(key_id)
            if len(self._stored) > _MOST_CACHED:
                self._stored.popitem(last=False)
        if stored is not None:
            self._note_use(stored)
        return stored

    def _note_use(self, stored: StoredKey) -> None:
        assert self._table is not None
        try:
            self._table.note_use(stored)
        except SQLAlchemyError:  # nobody is turned away for want of a time-stamp
            log.warning("the use of key %s was not noted", stored.id, exc_info=True)


@dataclass(frozen=True, slots=True, repr=False)
class Credentials:
    """What a request brings to be let in: a key, or a session token made of one."""

    token: str  # as `session_token` makes it
    key_id: str | None  # None: can only be a key of the environment
    bearer: str | None = None  # the key itself, where that was sent

    @property
    def digest(self) -> bytes:
        """Tells credentials apart without keeping them."""
        return hashlib.sha256(f"{self.key_id} {self.bearer} {self.token}".encode()).digest()


def credentials_of(headers: Headers) -> Credentials | None:
    """What the request's headers bring; a bearer key goes before the cookie."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return of_key(key.strip())
    cookies: SimpleCookie = SimpleCookie()
    try:
        cookies.load(headers.get("cookie", ""))
    except CookieError:
        return None
    found = cookies.get(COOKIE)
    if found is None:
        return None
    key_id, _, token = found.value.rpartition(".")
    # A cookie can hold any character, NUL too, which Postgres refuses to be asked for.
    return Credentials(token, key_id) if is_key_id(key_id) else Credentials(found.value, None)


def of_key(key: str) -> Credentials:
    """Credentials of a key as it was given out."""
    match = KEY_PATTERN.fullmatch(key)
    if match is None:
        return Credentials(session_token(key), None, key)
    return Credentials(session_token(match[2]), match[1], key)


def session_cookie(key: str) -> str:
    """The value of the cookie that stands for a key."""
    credentials = of_key(key)
    prefix = "" if credentials.key_id is None else f"{credentials.key_id}."
    return prefix + credentials.token


def _equal(credentials: Credentials, key: Credentials) -> bool:
    # The token is an HMAC of the key: equal tokens are equal keys.
    return credentials.key_id == key.key_id and hmac.compare_digest(
        credentials.token.encode(), key.token.encode()
    )
